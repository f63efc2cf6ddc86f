"""Stage: cached pictures -> the batches that networks take. Needs no torch, so any worker can."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from pipelines.rows import Reason, Refusal, Row, Rows
from udiff.data.schema import decode_png

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """Rows that go through the networks together."""

    rows: Rows
    images: np.ndarray | None = None
    """Pictures of the kept rows, uint8 (rows, height, width, 3); None where none is looked at."""


def decode_batch(rows: Sequence[Row], size: tuple[int, int], *, keep_image: bool) -> Batch:
    """Decode the pictures of some rows, which are of one height and width.

    Reads: image (PNG bytes, RGB).
    Writes: drops image, unless it is kept.
    Refuses: pictures that cannot be decoded, or are of another size.
    """
    decoded = Rows()
    for row in rows:
        decoded.add(row, partial(_decode, size=size))
    images = [row.pop("pixels") for row in decoded.kept]
    if not keep_image:
        for row in decoded.kept:
            del row["image"]
    return Batch(decoded, np.stack(images) if images else np.zeros((0, *size, 3), np.uint8))


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) in order, working on the next while the caller has this one."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in items:
            upcoming = pool.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = upcoming
        if pending is not None:
            yield pending.result()


def _decode(row: Row, size: tuple[int, int]) -> Row:
    try:
        pixels = decode_png(row["image"])
    except Exception as error:
        raise Refusal(Reason.CORRUPT, error) from error
    if pixels.shape != (*size, 3):
        raise Refusal(Reason.UNSUPPORTED, f"picture of shape {pixels.shape}")
    return {**row, "pixels": pixels}
