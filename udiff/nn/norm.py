"""Normalization layers."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm


class RMSNorm(nn.Module):
    """Scale to unit root mean square over the last axis (arXiv 1910.07467)."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Normalize; where weight and x differ in dtype, x's is returned to before the weight."""
        if x.dtype == self.weight.dtype:
            return rms_norm(x, x.shape[-1:], self.weight, self.eps)  # one pass
        return rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight
