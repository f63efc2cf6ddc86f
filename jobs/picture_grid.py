"""Lay pictures out as a labelled grid."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def draw_grid(
    pictures: np.ndarray, labels: Sequence[str], *, columns: int, zoom: int = 1
) -> Image.Image:
    """Draw one row per label, its name on the left.

    Args:
        pictures: uint8 (rows * columns, height, width, 3), row by row.
        labels: one per row.
        columns: pictures in a row.
        zoom: pixels per pixel.
    """
    height, width = (side * zoom for side in pictures.shape[1:3])
    font = ImageFont.load_default(size=max(11, height // 5))
    margin = int(max(font.getlength(label) for label in labels)) + 16
    gap = 2
    grid = Image.new(
        "RGB", (margin + columns * (width + gap), len(labels) * (height + gap)), "white"
    )
    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(labels):
        top = row * (height + gap)
        draw.text((8, top + height // 2), label, fill="black", font=font, anchor="lm")
        for column in range(columns):
            picture = Image.fromarray(pictures[row * columns + column])
            picture = picture.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(picture, (margin + column * (width + gap), top))
    return grid
