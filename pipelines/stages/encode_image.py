"""Stage: pictures -> latents. One autoencoder per actor."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import torch

from pipelines.rows import Reason, Refusal, Row, Rows
from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.pixels import to_pixels
from udiff.data.schema import decode_png

Precision = Literal["fp32", "bf16"]
Item = TypeVar("Item")
Result = TypeVar("Result")


class EncodeImage:
    """Encode the pictures of a unit, decoding the next batch while the network has this one.

    Batches are cut inside the unit in row order, so that its bytes do not depend on its neighbors.

    Reads: image (PNG bytes, size x size, RGB).
    Writes: latent_mean, latent_logvar, float16 (channels, height / f, width / f).
    Refuses: pictures that cannot be decoded, and latents that float16 cannot hold.
    """

    def __init__(
        self,
        autoencoder: KLAutoencoder,
        *,
        device: str,
        size: int,
        batch_size: int,
        precision: Precision,
    ) -> None:
        self._device = torch.device(device)
        self._autoencoder = autoencoder.to(self._device)
        self._size = size
        self._batch_size = batch_size
        self._precision = precision

    def latent_shape(self) -> tuple[int, ...]:
        """Find the shape of one latent by encoding a black picture."""
        black = np.zeros((1, self._size, self._size, 3), np.uint8)
        return self._encode(black)[0].shape[1:]

    def __call__(self, rows: Sequence[Row]) -> Rows:
        """Encode all rows of a unit, in order."""
        encoded = Rows()
        batches = [
            rows[start : start + self._batch_size]
            for start in range(0, len(rows), self._batch_size)
        ]
        with ThreadPoolExecutor(1) as pool:
            for batch in ahead(pool, self._decode, batches):
                encoded.rejected += batch.rejected
                self._add(encoded, batch.kept)
        return encoded

    def _decode(self, rows: Sequence[Row]) -> Rows:
        decoded = Rows()
        for row in rows:
            decoded.add(row, self._pixels)
        return decoded

    def _pixels(self, row: Row) -> Row:
        try:
            image = decode_png(row["image"])
        except Exception as error:
            raise Refusal(Reason.CORRUPT, error) from error
        if image.shape != (self._size, self._size, 3):
            raise Refusal(Reason.UNSUPPORTED, f"picture of shape {image.shape}")
        return {**row, "decoded": image}

    def _add(self, encoded: Rows, rows: Sequence[Row]) -> None:
        if not rows:
            return
        means, logvars = self._encode(np.stack([row["decoded"] for row in rows]))
        for row, mean, logvar in zip(rows, means, logvars, strict=True):
            rest = {name: value for name, value in row.items() if name != "decoded"}
            encoded.add({**rest, "latent_mean": mean, "latent_logvar": logvar}, check_finite)

    @torch.inference_mode()
    def _encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = to_pixels(torch.from_numpy(images).to(self._device))
        half = self._precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            moments = self._autoencoder.encode_moments(pixels)
        return _float16(moments.mean), _float16(moments.logvar)


def check_finite(row: Row) -> Row:
    """Refuse latents that overflowed, in the network or in float16.

    Reads: latent_mean, latent_logvar.
    """
    for name in ("latent_mean", "latent_logvar"):
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


def _float16(values: torch.Tensor) -> np.ndarray:
    return values.half().cpu().numpy()
