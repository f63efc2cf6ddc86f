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
) -> Float[Tensor, "channels ..."]:
    """Move the conditional answer away from the unconditional one, in the first `channels` alone."""
    guided = unconditional + scale * (conditional - unconditional)
    if channels is None:
        return guided
    return torch.cat([guided[:channels], conditional[channels:]])
