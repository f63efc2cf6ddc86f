"""The encoders of a latents chain: what they make of a unit, and what they are known by."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
from pydantic import JsonValue
from torch import Tensor

from pipelines.latents_settings import FeatureSettings, LatentsSettings, TextSettings
from pipelines.rows import Row, Rows
from pipelines.stages.decode_batch import Batch
from pipelines.stages.encode_image import (
    EncodeImage,
    Images,
    PictureColumns,
    encode_mirrored,
    encode_moments,
    encode_sample,
)
from pipelines.stages.encode_text import EncodeText
from pipelines.stages.write import TextColumn
from udiff.autoencoders.optimus_checkpoint import TextAutoencoder, load_text_autoencoder
from udiff.autoencoders.optimus_text import OptimusTokens, load_optimus_tokenizer
from udiff.bundle import load_autoencoder
from udiff.data.manifest import Identity
from udiff.data.schema import FLIPPED, tensor_field, text_fields
from udiff.encoders.clip import CLIPContexts, load_clip
from udiff.encoders.dinov2 import DINOv2, load_dinov2
from udiff.encoders.t5 import T5, load_t5
from udiff.encoders.text import TextEncoder
from udiff.settings import EncoderSettings, T5Settings

Shapes = Mapping[str, tuple[int, ...]]
_COMPUTED = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Encoders:
    """All encoders of a chain."""

    settings: LatentsSettings
    pictures: tuple[PictureColumns, ...]
    texts: tuple[EncodeText, ...]
    identity: Identity
    """Per column, what makes it."""

    def picture_shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Find the shapes of what is made of pictures of a size, by encoding a black one."""
        return self._image().shapes(height, width)

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Find the shapes of what is made of texts, by encoding an empty one."""
        shapes: dict[str, tuple[int, ...]] = {}
        for column, text in zip(self.settings.texts, self.texts, strict=True):
            shapes |= dict.fromkeys(column.token_columns(), (column.max_tokens,))
            if column.store != "tokens":
                shapes[column.name] = text.shape()
        return shapes

    def __call__(self, batches: Iterable[Batch]) -> Rows:
        """Encode the batches of a unit."""
        if self.pictures:
            encoded = self._image()(batches)
        else:
            encoded = Rows(kept=[row for batch in batches for row in batch.rows.kept])
        for text in self.texts:
            encoded = text(encoded)
        return encoded

    def fields(self, shapes: Shapes) -> list[pa.Field]:
        """Describe the columns of the data files."""
        fields = [
            tensor_field(name, shapes[name], columns.dtype)
            for columns in self.pictures
            for name in columns.names
        ]
        for text in self.settings.texts:
            fields += [tensor_field(name, shapes[name], "int32") for name in text.token_columns()]
            if text.store != "tokens":
                fields.append(_text_fields(text, shapes)[0])
        return fields

    def text_columns(self, shapes: Shapes) -> list[TextColumn]:
        """Describe the columns of the texts files."""
        return [
            TextColumn(_text_fields(text, shapes)[1], text.source)
            for text in self.settings.texts
            if text.store != "tokens"
        ]

    def _image(self) -> EncodeImage:
        return EncodeImage(
            self.pictures, device=self.settings.device, precision=self.settings.precision
        )


def load_encoders(settings: LatentsSettings, *, device: str) -> Encoders:
    """Load all encoders that settings name.

    Raises:
        FileNotFoundError: there is none at a path.
    """
    settings = settings.model_copy(update={"gpus": 0}) if device == "cpu" else settings
    pictures: list[PictureColumns] = []
    identity: Identity = {}
    if settings.autoencoder is not None:
        columns, identity["latent"] = _load_latent(settings, settings.autoencoder, device)
        pictures.append(columns)
    for feature in settings.features:
        vision = _load_vision(feature).to(device)
        pictures.append(feature_columns(feature, vision))
        identity[feature.name] = _feature_identity(settings, feature, vision)
    if settings.flip:
        pictures += [_mirror(columns) for columns in pictures]
    texts = []
    for text in settings.texts:
        encoder = _load_text(text).to(device)
        texts.append(EncodeText(text, encoder, device=device, batch_size=settings.batch_size))
        identity[text.name] = _text_identity(text, encoder)
    return Encoders(settings, tuple(pictures), tuple(texts), identity)


def _load_latent(
    settings: LatentsSettings, path: str, device: str
) -> tuple[PictureColumns, dict[str, JsonValue]]:
    autoencoder = load_autoencoder(path).to(device)
    autoencoder.save_memory(sliced=settings.sliced, tile=settings.tile)
    made_by: dict[str, JsonValue] = {
        "autoencoder": autoencoder.fingerprint(),
        "dtype": _COMPUTED[settings.precision],
        "stored": settings.dtype,
        "content": settings.latent,
    }
    if settings.tile is not None:
        made_by["tile"] = settings.tile
    if settings.latent == "moments":
        moments = partial(encode_moments, autoencoder)
        return PictureColumns(("latent_mean", "latent_logvar"), moments, settings.dtype), made_by
    sample = partial(encode_sample, autoencoder, settings.seed)
    return PictureColumns(("latent",), sample, settings.dtype), {**made_by, "seed": settings.seed}


def feature_columns(feature: FeatureSettings, encoder: DINOv2 | CLIPContexts) -> PictureColumns:
    """Describe the column that a vision encoder makes."""

    def encode(images: Images, _: Sequence[Row]) -> dict[str, Tensor]:
        if isinstance(encoder, CLIPContexts):
            return {feature.name: encoder.encode_image(encoder.prepare_batch(images))}
        return {feature.name: encoder(images.permute(0, 3, 1, 2).float() / 255)}

    return PictureColumns((feature.name,), encode, feature.dtype)


def _feature_identity(
    settings: LatentsSettings, feature: FeatureSettings, encoder: DINOv2 | CLIPContexts
) -> dict[str, JsonValue]:
    return {
        "encoder": encoder.fingerprint(),
        "kind": feature.encoder,
        "dtype": _COMPUTED[settings.precision],
        "stored": feature.dtype,
    }


def _mirror(columns: PictureColumns) -> PictureColumns:
    names = tuple(f"{name}{FLIPPED}" for name in columns.names)
    return PictureColumns(names, partial(encode_mirrored, columns.encode), columns.dtype)


def _load_vision(feature: FeatureSettings) -> DINOv2 | CLIPContexts:
    if feature.encoder == "clip":
        return load_clip(EncoderSettings(path=feature.path))
    return load_dinov2(feature.path)


def _load_text(text: TextSettings) -> T5 | CLIPContexts | TextAutoencoder | OptimusTokens:
    match text.encoder:
        case "t5":
            return load_t5(T5Settings(path=text.path, pad=text.pad, precision=text.precision))
        case "clip":
            return load_clip(EncoderSettings(path=text.path))
        case "optimus":
            return load_text_autoencoder(EncoderSettings(path=text.path))
        case "optimus_pieces":
            return OptimusTokens.of_pieces(load_optimus_tokenizer(text.path))
        case "optimus_labels":
            return OptimusTokens.of_labels(load_optimus_tokenizer(text.path))


def _text_identity(text: TextSettings, encoder: TextEncoder) -> dict[str, JsonValue]:
    return {
        "encoder": encoder.fingerprint(),
        "kind": text.encoder,
        "source": text.source,
        "max_tokens": text.max_tokens,
        **({"layout": text.layout} if text.layout != "plain" else {}),
        "trim": text.trim,
        "dtype": _COMPUTED[text.precision],
        "stored": text.dtype,
    }


def _text_fields(text: TextSettings, shapes: Shapes) -> tuple[pa.Field, pa.Field]:
    return text_fields(text.name, shapes[text.name], text.dtype)
