"""Small squares of real photographs."""

import numpy as np
from PIL import Image

from jobs.fetch_testdata import fetch_stock_photographs

HELD_OUT = 20
"""Photographs that no crop to train on is from."""


def crops_to_train_on(per_picture: int, *, size: int) -> np.ndarray:
    """Cut squares out of eighty photographs, each at a scale and a place of its own.

    Returns:
        uint8 (80 * per_picture, size, size, 3).
    """
    return _crops(slice(HELD_OUT, None), per_picture, size)


def held_out_crops(per_picture: int, *, size: int) -> np.ndarray:
    """Cut squares out of the other twenty."""
    return _crops(slice(HELD_OUT), per_picture, size)


def _crops(which: slice, per_picture: int, size: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    crops = []
    for file in sorted(fetch_stock_photographs().glob("*.jpg"))[which]:
        with Image.open(file) as photograph:
            for _ in range(per_picture):
                side = int(draw.integers(size, photograph.width // 2))
                left, top = draw.integers(0, [n - side for n in photograph.size])
                box = (left, top, left + side, top + side)
                square = photograph.convert("RGB").resize((size, size), box=box, reducing_gap=3)
                crops.append(np.asarray(square))
    return np.stack(crops)
