"""Stage: pictures -> latents and features. One of each encoder per actor."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from pipelines.rows import Reason, Refusal, Row, Rows
from pipelines.stages.decode_batch import Batch
from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.pixels import to_pixels
from udiff.data.packing import PackedDtype
from udiff.data.schema import FLIPPED

Precision = Literal["fp32", "bf16"]
Images = UInt8[Tensor, "batch height width 3"]
Encode = Callable[[Images, Sequence[Row]], dict[str, Tensor]]
"""Makes columns, float (batch, ...), of pictures and the rows that they belong to."""


@dataclass(frozen=True)
class PictureColumns:
    """Columns that come from one encoder."""

    names: tuple[str, ...]
    encode: Encode
    dtype: PackedDtype
    """Element type that is stored."""


class EncodeImage:
    """Encode the pictures of a unit, batch by batch as they come.

    Batches are cut inside the unit in row order, so that its bytes do not depend on its neighbors.

    Reads: batches of decoded pictures.
    Writes: the columns of its encoders, float (...) each.
    Refuses: values that the stored type cannot hold.
    """

    def __init__(
        self, columns: Sequence[PictureColumns], *, device: str, precision: Precision
    ) -> None:
        self._columns = columns
        self._device = torch.device(device)
        self._precision = precision

    def shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Find the shape of each column by encoding a black picture."""
        black = np.zeros((1, height, width, 3), np.uint8)
        encoded = self._encode(black, [{"key": "", "source": ""}])
        return {name: values.shape[1:] for name, values in encoded.items()}

    def __call__(self, batches: Iterable[Batch]) -> Rows:
        """Encode all rows of a unit, in order."""
        encoded = Rows()
        for batch in batches:
            encoded.rejected += batch.rows.rejected
            if batch.rows.kept:
                self._add(encoded, batch)
        return encoded

    def _add(self, encoded: Rows, batch: Batch) -> None:
        assert batch.images is not None
        columns = self._encode(batch.images, batch.rows.kept)
        for number, row in enumerate(batch.rows.kept):
            values = {name: column[number] for name, column in columns.items()}
            encoded.add({**row, **values}, partial(check_finite, names=tuple(values)))

    @torch.inference_mode()
    def _encode(self, images: np.ndarray, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        # A copy: images that another process decoded are in memory that must not be written to.
        pictures, half = torch.tensor(images, device=self._device), self._precision == "bf16"
        found: dict[str, np.ndarray] = {}
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            for columns in self._columns:
                encoded = columns.encode(pictures, rows)
                found |= {name: to_stored(encoded[name], columns.dtype) for name in columns.names}
        return found


def encode_moments(
    autoencoder: KLAutoencoder, images: Images, _: Sequence[Row]
) -> dict[str, Tensor]:
    """Encode to the distribution of raw latents: latent_mean, latent_logvar."""
    moments = autoencoder.encode_moments(to_pixels(images))
    return {"latent_mean": moments.mean, "latent_logvar": moments.logvar}


def encode_sample(
    autoencoder: KLAutoencoder, seed: int, images: Images, rows: Sequence[Row]
) -> dict[str, Tensor]:
    """Draw one raw latent for each picture, a function of seed and row: latent."""
    moments = autoencoder.encode_moments(to_pixels(images))
    noise = torch.stack([_normal(seed, row, moments.mean.shape[1:]) for row in rows])
    return {"latent": moments.sample(noise.to(moments.mean))}


def encode_mirrored(encode: Encode, images: Images, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Encode pictures with left and right exchanged: `<name>_flipped` for each name."""
    encoded = encode(images.flip(2), rows)
    return {f"{name}{FLIPPED}": values for name, values in encoded.items()}


def _normal(seed: int, row: Row, shape: Sequence[int]) -> Tensor:
    digest = hashlib.sha256(f"{seed} {row['source']} {row['key']}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(*shape, generator=generator)


def check_finite(row: Row, names: Sequence[str]) -> Row:
    """Refuse values that overflowed, in the network or in the stored type.

    Reads: `names`.
    """
    for name in names:
        if not np.isfinite(row[name]).all():
            raise Refusal(Reason.NOT_FINITE, name)
    return row


def to_stored(values: Tensor, dtype: PackedDtype) -> np.ndarray:
    """Bring values to the CPU: float16 as such, what is packed later as float32."""
    kept = values.half() if dtype == "float16" else values.float()
    return kept.cpu().numpy()
