"""Classifier-free guidance (arXiv 2207.12598) in an interval (arXiv 2404.07724)."""

import torch
from jaxtyping import Float
from torch import Tensor


def guide(
    conditional: Float[Tensor, "channels ..."],
    unconditional: Float[Tensor, "channels ..."],
    *,
    scale: float,
    channels: int | None = None,
    first_channel: int = 0,
    other_scale: float = 1.0,
) -> Float[Tensor, "channels ..."]:
    """Move the conditional answer away from the unconditional one.

    By `scale` in the channels from `first_channel` up to (without) `channels`, in the others by
    `other_scale`.
    """
    difference = conditional - unconditional
    guided = unconditional + scale * difference
    end = len(guided) if channels is None else channels
    if not first_channel and end >= len(guided):
        return guided
    others = conditional if other_scale == 1 else unconditional + other_scale * difference
    return torch.cat([others[:first_channel], guided[first_channel:end], others[end:]])
