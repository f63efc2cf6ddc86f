"""Rotary position embedding on a two-dimensional grid (RoPE, arXiv 2104.09864)."""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class RotaryTable(NamedTuple):
    """Cosine and sine of each token's rotation, one per pair of adjacent channels, float32."""

    cos: Float[Tensor, "*batch tokens pairs"]
    sin: Float[Tensor, "*batch tokens pairs"]

    def keep(self, tokens: Int[Tensor, "batch kept"]) -> "RotaryTable":
        """Select tokens, others in every sample."""
        return RotaryTable(self.cos[tokens], self.sin[tokens])


@lru_cache(maxsize=64)
def rotary_table(
    grid: tuple[int, int], head_dim: int, *, extent: float, device: torch.device
) -> RotaryTable:
    """Compute the table of a (height, width) grid whose sides both span [0, extent].

    Pair 2k turns with the column, pair 2k + 1 with the row, at frequency 10000^(-4k / head_dim).

    Raises:
        ValueError: head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(
            f"head_dim must be a multiple of 4 for 2-D rotary positions, got {head_dim}"
        )
    k = torch.arange(0, head_dim, 4, dtype=torch.float32)
    frequencies = 1.0 / 10000.0 ** (k / head_dim)
    height, width = grid
    rows, columns = torch.linspace(0, extent, height), torch.linspace(0, extent, width)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    angles = torch.stack(
        [torch.outer(column.flatten(), frequencies), torch.outer(row.flatten(), frequencies)], -1
    ).flatten(1)
    return RotaryTable(angles.cos().to(device), angles.sin().to(device))


def rotate(
    x: Float[Tensor, "batch heads tokens head_dim"], table: RotaryTable
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Turn every pair of adjacent channels by its token's angle, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = table.cos.unsqueeze(-3), table.sin.unsqueeze(-3)
    if torch.compiler.is_compiling():  # which fuses real numbers, but not complex ones
        even, odd = pairs.unbind(-1)
        real, imaginary = even * cos - odd * sin, even * sin + odd * cos
        return torch.stack([real, imaginary], -1).flatten(-2).to(x.dtype)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)  # one pass
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
