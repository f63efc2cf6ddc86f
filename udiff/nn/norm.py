"""Normalization layers."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scale to unit root mean square over the last axis; statistics in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Normalize in float32, return to the dtype of x, then apply the weight."""
        normalized = nn.functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return normalized.to(x.dtype) * self.weight
