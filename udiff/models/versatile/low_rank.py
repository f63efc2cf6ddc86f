"""Edits of a picture's context through its singular values (arXiv 2211.08332, section 4.3).

The leading components of a picture's tokens hold its style, the others what it shows. All operators
work on tokens less their mean over channels, which is added back. Officially the decomposition is a
randomized one; here it is exact.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

Tokens = Float[Tensor, "*images tokens dim"]

FOCUS_RANK = 20
"""Components that `focus` weighs."""
REMOVE_RANK, REDUCED_RANK = 50, 10
"""Components that are left of tokens whose leading ones are removed; of a reduced context."""


def focus(
    tokens: Tokens, level: float, *, drop_rank: tuple[int, int] = (1, 5), rank: int = FOCUS_RANK
) -> Tokens:
    """Move a picture's local tokens towards what it shows, or towards its style.

    Args:
        tokens: without the class token.
        level: 0 is what is shown alone, 1 the style alone, 0.5 changes nothing.
        drop_rank: the last component of the style, and the first that is not.
        rank: components that are weighed.

    Returns:
        Tokens of the same standard deviation over all elements.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"focus must be in [0, 1], got {level}")
    if level == 0.5:
        return tokens
    mean = tokens.mean(-1, keepdim=True)
    centered = tokens - mean
    weights = _focus_weights(level, drop_rank, rank).to(tokens)
    u, s, v = _leading(centered, rank)
    changed = (u * (s * weights[: s.shape[-1]])[..., None, :]) @ v
    if level < 0.5:
        changed = changed + centered - (u * s[..., None, :]) @ v
    changed = changed + mean
    return changed * (_deviation(tokens) / _deviation(changed))


def keep_leading(tokens: Tokens, number: int) -> Tokens:
    """Keep the leading components alone."""
    mean = tokens.mean(-1, keepdim=True)
    u, s, v = _leading(tokens - mean, number)
    return (u * s[..., None, :]) @ v + mean


def remove_leading(tokens: Tokens, number: int, *, rank: int = REMOVE_RANK) -> Tokens:
    """Remove the leading components of the first `rank`; those behind them go too."""
    mean = tokens.mean(-1, keepdim=True)
    u, s, v = _leading(tokens - mean, rank)
    kept = torch.cat([torch.zeros_like(s[..., :number]), s[..., number:]], dim=-1)
    return (u * kept[..., None, :]) @ v + mean


def disentangle(tokens: Tokens, level: int) -> Tokens:
    """Change a picture's local tokens by one of the first release's levels.

    -2 and -1 remove the first 2 and the first component; 1 and 2 keep the first 10 and the first 2.

    Raises:
        ValueError: there is no such level.
    """
    match level:
        case 0:
            return tokens
        case -1 | -2:
            return remove_leading(tokens, -level)
        case 1:
            return keep_leading(tokens, REDUCED_RANK)
        case 2:
            return keep_leading(tokens, 2)
        case _:
            raise ValueError(f"disentanglement must be in -2..2, got {level}")


def _focus_weights(level: float, drop_rank: tuple[int, int], rank: int) -> Tensor:
    """Compute the factors of singular values; they reach 1 next to the range that is weighed."""
    last, first = drop_rank
    component = torch.arange(rank, dtype=torch.float64)
    weights = torch.ones(rank, dtype=torch.float64)
    if level < 0.5:
        floor = -last + (1 + last) * _progress(level, end=0.0)
        ramp = floor + (1 - floor) * component / (last + 1)
        weights[: last + 1] = ramp[: last + 1].clamp_min(0)
    else:
        span = rank - first
        floor = -span + (1 + span) * _progress(level, end=1.0)
        ramp = floor + (1 - floor) * (component - (rank - 1)) / (first - rank)
        weights[first:] = ramp[first:].clamp_min(0)
    return weights


def _progress(level: float, *, end: float) -> float:
    """Go exponentially from 0 at an end to 1 in the middle."""
    at, at_end = (math.exp(2 * (value - 0.5)) for value in (level, end))
    return (at - at_end) / (1 - at_end)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[..., :rank], s[..., :rank], v[..., :rank, :]


def _deviation(tokens: Tensor) -> Tensor:
    return tokens.flatten(-2).std(-1)[..., None, None]
