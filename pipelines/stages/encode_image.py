"""Stage: pictures -> latents and features. One of each encoder per actor."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from pipelines.rows import Reason, Refusal, Row, Rows
from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.pixels import to_pixels
from udiff.data.packing import PackedDtype
from udiff.data.schema import FLIPPED, decode_png

Precision = Literal["fp32", "bf16"]
Images = UInt8[Tensor, "batch height width 3"]
Encode = Callable[[Images, Sequence[Row]], dict[str, Tensor]]
"""Makes columns, float (batch, ...), of pictures and the rows that they belong to."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PictureColumns:
    """Columns that come from one encoder."""

    names: tuple[str, ...]
    encode: Encode
    dtype: PackedDtype
    """Element type that is stored."""


class EncodeImage:
    """Encode the pictures of a unit, decoding the next batch while the networks have this one.

    Batches are cut inside the unit in row order, so that its bytes do not depend on its neighbors.

    Reads: image (PNG bytes, RGB, all of one size).
    Writes: the columns of its encoders, float (...) each.
    Refuses: pictures that cannot be decoded, and values that the stored type cannot hold.
    """

    def __init__(
        self,
        columns: Sequence[PictureColumns],
        *,
        device: str,
        batch_size: int,
        precision: Precision,
    ) -> None:
        self._columns = columns
        self._device = torch.device(device)
        self._batch_size = batch_size
        self._precision = precision

    def shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Find the shape of each column by encoding a black picture."""
        black = np.zeros((1, height, width, 3), np.uint8)
        encoded = self._encode(black, [{"key": "", "source": ""}])
        return {name: values.shape[1:] for name, values in encoded.items()}

    def __call__(self, rows: Sequence[Row], size: tuple[int, int]) -> Rows:
        """Encode all rows of a unit, in order; their pictures have this height and width."""
        encoded = Rows()
        batches = [
            rows[start : start + self._batch_size]
            for start in range(0, len(rows), self._batch_size)
        ]
        with ThreadPoolExecutor(1) as pool:
            for batch in ahead(pool, partial(_decode, size=size), batches):
                encoded.rejected += batch.rejected
                self._add(encoded, batch.kept)
        return encoded

    def _add(self, encoded: Rows, rows: Sequence[Row]) -> None:
        if not rows:
            return
        columns = self._encode(np.stack([row["decoded"] for row in rows]), rows)
        for number, row in enumerate(rows):
            rest = {name: value for name, value in row.items() if name != "decoded"}
            values = {name: column[number] for name, column in columns.items()}
            encoded.add({**rest, **values}, partial(check_finite, names=tuple(values)))

    @torch.inference_mode()
    def _encode(self, images: np.ndarray, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        pictures, half = torch.from_numpy(images).to(self._device), self._precision == "bf16"
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


def _decode(rows: Sequence[Row], size: tuple[int, int]) -> Rows:
    decoded = Rows()
    for row in rows:
        decoded.add(row, partial(_pixels, size=size))
    return decoded


def _pixels(row: Row, size: tuple[int, int]) -> Row:
    try:
        image = decode_png(row["image"])
    except Exception as error:
        raise Refusal(Reason.CORRUPT, error) from error
    if image.shape != (*size, 3):
        raise Refusal(Reason.UNSUPPORTED, f"picture of shape {image.shape}")
    return {**row, "decoded": image}


def check_finite(row: Row, names: Sequence[str]) -> Row:
    """Refuse values that overflowed, in the network or in the stored type.

    Reads: `names`.
    """
    for name in names:
        if not np.isfinite(row[name]).all():
            raise Refusal(Reason.NOT_FINITE, name)
    return row


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Yield function(item) in order, working on the next while the caller has this one."""
    pending = None
    for item in items:
        upcoming = pool.submit(function, item)
        if pending is not None:
            yield pending.result()
        pending = upcoming
    if pending is not None:
        yield pending.result()


def to_stored(values: Tensor, dtype: PackedDtype) -> np.ndarray:
    """Bring values to the CPU: float16 as such, what is packed later as float32."""
    kept = values.half() if dtype == "float16" else values.float()
    return kept.cpu().numpy()
