"""What a latents cache is made of: latents, encoded texts, tokens, features."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from pipelines.network_settings import NetworkSettings
from pipelines.rows import Row
from udiff.data.packing import PackedDtype
from udiff.settings import Settings

_NAME = r"^[a-z][a-z0-9_]*$"


class ColumnSettings(Settings):
    """An encoder, and the column that its results go to."""

    name: str = Field(pattern=_NAME)
    path: str
    """Hub id or local folder of the encoder."""
    dtype: PackedDtype = "float16"
    """Element type that is stored."""

    def absolute(self) -> Self:
        """Make a local path absolute: actors have another working directory."""
        return self.model_copy(update={"path": absolute_path(self.path)})


class TextSettings(ColumnSettings):
    """Texts, as states of their tokens (column `<name>`), or as ids (column `<name>_tokens`)."""

    name: str = Field(default="text", pattern=_NAME)
    encoder: Literal["t5", "clip", "optimus", "optimus_pieces", "optimus_labels"]
    """`clip` and `optimus` give states; the last two cut texts for Optimus alone, and their path is
    a folder of vocabularies."""
    max_tokens: PositiveInt
    """Longest text; a longer one is cut. Encoders that look at padding see as much of it."""
    source: str = Field(default="caption", pattern=r"^\w+(\.\d+)?$")
    """Column of the pictures cache that holds the texts; of a column of lists, such as the captions
    that a model wrote, `recaption.0` is the first, and the list begins anew behind its end."""
    store: Literal["states", "tokens", "both"] = "states"
    layout: Literal["plain", "forward", "reverse", "reverse_end"] = "plain"
    """Of texts that are conversations, whose questions and answers are laid out as tokens; the
    column `<name>_learned` says which of them are to be learned."""
    trim: bool = True
    """Leave the states out that belong to padding."""
    pad: Literal["end", "pad"] = "pad"
    """Token that fills short texts up, of T5: a further end token, or T5's own."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network."""

    @property
    def column(self) -> str:
        """Column that is read."""
        return self.source.partition(".")[0]

    def token_columns(self) -> tuple[str, ...]:
        """Name the columns that hold a number per token."""
        if self.store == "states":
            return ()
        tokens, learned = f"{self.name}_tokens", f"{self.name}_learned"
        return (tokens,) if self.layout == "plain" else (tokens, learned)

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if self.layout != "plain" and self.store != "tokens":
            raise ValueError(f"layout={self.layout} needs store=tokens, got {self.store}")
        if self.layout != "plain" and self.encoder != "t5":
            raise ValueError(f"layout={self.layout} needs encoder=t5, got {self.encoder}")
        if self.encoder in ("optimus_pieces", "optimus_labels") and self.store != "tokens":
            raise ValueError(f"encoder {self.encoder} has no states: store must be tokens")
        return self


class FeatureSettings(ColumnSettings):
    """Tokens that a vision encoder makes of the picture."""

    name: str = Field(default="dino_feature", pattern=_NAME)
    encoder: Literal["dinov2", "clip"] = "dinov2"


def read_text(row: Row, source: str) -> str:
    """Read the text that a source names; "" where its list is empty."""
    column, _, number = source.partition(".")
    found = row[column]
    if isinstance(found, str):
        return found
    return found[int(number or 0) % len(found)] if found else ""


def states_column(name: str) -> str:
    """Name a text's states among a row's columns, where the text itself may have their name."""
    return f"{name}_states"


def absolute_path(path: str) -> str:
    """Make the path of something local absolute; names of a hub stay as they are."""
    return str(Path(path).absolute()) if Path(path).exists() else path


class LatentsSettings(NetworkSettings):
    """What a latents cache is made from, and how."""

    input: str
    """Folder or bucket URI of the pictures cache."""
    output: str
    update: bool = False
    """Go on with a cache whose pictures have changed: encode only the files of pictures that are
    other than they were."""
    autoencoder: str | None = None
    """Hub id, a diffusers folder, or a bundle of an autoencoder family; without one, no latents."""
    latent: Literal["moments", "sample"] = "moments"
    """Columns `latent_mean` and `latent_logvar`, or one draw of each posterior as `latent`."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""
    dtype: PackedDtype = "float16"
    """Element type of the latents."""
    sliced: bool = False
    """Encode one picture at a time; changes the last bits of the latents."""
    tile: PositiveInt | None = None
    """Side in pixels of the overlapping squares in which larger pictures are encoded."""
    flip: bool = False
    """Encode each picture with left and right exchanged, too: columns `<name>_flipped`."""
    texts: tuple[TextSettings, ...] = ()
    features: tuple[FeatureSettings, ...] = ()
    keep_image: bool = False
    """Carry the pictures along, for teachers that look at them in training."""
    batch_size: PositiveInt = 32
    decoders: int | None = Field(default=None, ge=0)
    """CPUs, of any machine, that read and decode the next units while workers encode; 0 has each
    worker decode its own. Left open: what workers with GPUs leave free, 4 for each at most, and
    none where the pictures of a unit take over 1 GiB once decoded."""

    @model_validator(mode="after")
    def _check_columns(self) -> "LatentsSettings":
        names = [column.name for column in (*self.texts, *self.features)]
        if not names and self.autoencoder is None:
            raise ValueError("nothing to encode: give an autoencoder, a text or a feature")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two columns have the name {', '.join(sorted(twice))}")
        return self

    @property
    def encodes_pictures(self) -> bool:
        """Whether pictures are looked at, or texts alone."""
        return self.autoencoder is not None or bool(self.features)

    def absolute(self) -> "LatentsSettings":
        """Make the paths of local encoders absolute: actors have another working directory."""
        changes = {
            "autoencoder": self.autoencoder and absolute_path(self.autoencoder),
            "texts": tuple(text.absolute() for text in self.texts),
            "features": tuple(feature.absolute() for feature in self.features),
        }
        return self.model_copy(update=changes)
