"""Large pictures in overlapping tiles: memory for one tile, whatever the size of the picture."""

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

Grid = Float[Tensor, "batch channels height width"]
Resized = Float[Tensor, "batch other_channels other_height other_width"]
OVERLAP = 4
"""Neighbors share a fourth of their side, as diffusers' tiles do."""


def map_tiles(
    network: Callable[[Tensor], Tensor], x: Grid, *, side: int, scale: Fraction
) -> Resized:
    """Run a network on overlapping squares, which fade into each other where they overlap.

    Group norm and attention see one tile alone, so the result differs a little from the whole's,
    away from seams too. What fits into one tile is not cut.

    Args:
        network: makes each side `scale` times as long.
        x: what it reads.
        side: of a tile, in elements of `x`.
        scale: a fourth of a tile must be a whole number of elements, before and after.
    """
    height, width = x.shape[-2:]
    spans = list(product(_spans(height, side), _spans(width, side)))
    if len(spans) == 1:
        return network(x)
    tiles = (network(x[..., rows, columns]) for rows, columns in spans)
    total = weights = x.new_zeros(())
    for (rows, columns), tile in zip(spans, tiles, strict=True):
        if not total.ndim:
            total = tile.new_zeros(*tile.shape[:2], int(height * scale), int(width * scale))
            weights = torch.zeros_like(total[:1, :1])
        place = (..., _scaled(rows, scale), _scaled(columns, scale))
        fade = _fade(tile, int(side * scale) // OVERLAP)
        total[place] += fade * tile
        weights[place] += fade
    return total / weights


def _spans(size: int, side: int) -> list[slice]:
    """Cover an axis with tiles of full length; the last one overlaps more."""
    stride = side - side // OVERLAP
    starts = range(0, max(size - side, 0) + stride, stride)
    firsts = [max(0, min(start, size - side)) for start in starts]
    return [slice(first, min(first + side, size)) for first in dict.fromkeys(firsts)]


def _scaled(span: slice, scale: Fraction) -> slice:
    return slice(int(span.start * scale), int(span.stop * scale))


def _fade(tile: Tensor, overlap: int) -> Tensor:
    """Weigh a tile's places: less, linearly, within `overlap` of its edges."""
    down, right = (
        torch.minimum(steps, steps.flip(0)).clamp(max=overlap)
        for steps in (torch.arange(1, n + 1, device=tile.device) for n in tile.shape[-2:])
    )
    return (down[:, None] * right).to(tile.dtype)
