"""Dropping tokens and putting them back (MAE, arXiv 2111.06377)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def kept_tokens(noise: Float[Tensor, "batch tokens"], num_kept: int) -> Int[Tensor, "batch kept"]:
    """Choose the tokens with the smallest noise, in the order of their noise."""
    return noise.argsort(dim=1)[:, :num_kept]


def keep_tokens(
    x: Float[Tensor, "batch tokens dim"], keep: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept dim"]:
    """Select tokens, in the order of `keep`."""
    return x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))


def restore_tokens(
    x: Float[Tensor, "batch kept dim"],
    keep: Int[Tensor, "batch kept"],
    filler: Float[Tensor, "batch tokens dim"],
) -> Float[Tensor, "batch tokens dim"]:
    """Put selected tokens back into their places; `filler` stays everywhere else."""
    return filler.scatter(1, keep[:, :, None].expand(-1, -1, x.shape[-1]), x)


def is_removed(keep: Int[Tensor, "batch kept"], num_tokens: int) -> Bool[Tensor, "batch tokens"]:
    """Mark the tokens that `keep` left out."""
    removed = torch.ones(len(keep), num_tokens, dtype=torch.bool, device=keep.device)
    return removed.scatter_(1, keep, False)
