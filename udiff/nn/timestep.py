"""Sinusoidal features of time."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def timestep_features(
    t: Float[Tensor, " batch"], dim: int, *, max_period: float
) -> Float[Tensor, "batch dim"]:
    """Compute [cos(t f), sin(t f)] for `dim // 2` frequencies f falling from 1 to 1 / max_period.

    An odd dim has one column of zeros more.

    In float32 whatever the dtype of t. The frequencies are exp(-ln(max_period) k / (dim / 2)):
    a power instead of the exponential differs in the last bit, which large t magnify. An odd `dim`
    ends in a zero.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * k / half)
    odd = angles.new_zeros(len(angles), dim % 2)
    return torch.cat([angles.cos(), angles.sin(), odd], dim=-1)
