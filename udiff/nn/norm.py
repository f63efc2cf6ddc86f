"""Normalization layers, by themselves and modulated by a condition."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, addcmul, nn
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


class ModulatedRMSNorm(RMSNorm):
    """`RMSNorm`, and then x (1 + scale) + shift."""

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch tokens dim"],
        scale: Float[Tensor, "batch #tokens dim"],
        shift: Float[Tensor, "batch #tokens dim"] | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Normalize and modulate."""
        if by_hand(x, self.weight, scale):
            gain = addcmul(self.weight, self.weight, scale)
            return AffineRMS.apply(x, gain, shift, self.eps)
        return modulate(super().forward(x), scale, shift)


class ModulatedLayerNorm(nn.LayerNorm):
    """Layer norm without weights (eps 1e-6), and then x (1 + scale) + shift."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6, elementwise_affine=False)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch tokens dim"],
        scale: Float[Tensor, "batch #tokens dim"],
        shift: Float[Tensor, "batch #tokens dim"] | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Normalize and modulate."""
        return modulate(super().forward(x), scale, shift)


def modulate(
    x: Float[Tensor, "batch tokens dim"],
    scale: Float[Tensor, "batch #tokens dim"],
    shift: Float[Tensor, "batch #tokens dim"] | None,
) -> Float[Tensor, "batch tokens dim"]:
    """Compute x (1 + scale) + shift."""
    return x * (1 + scale) if shift is None else addcmul(shift, x, 1 + scale)


def by_hand(*tensors: Tensor) -> bool:
    """Say whether a chain of elementwise steps should take the gradient that is written by hand.

    On CPUs every step is a pass over all tokens; compilers and GPU kernels fuse them by themselves.
    """
    dtype = tensors[0].dtype
    return (
        not torch.compiler.is_compiling()
        and dtype in (torch.float32, torch.float64)
        and all(t.device.type == "cpu" and t.dtype == dtype for t in tensors)
    )


class AffineRMS(torch.autograd.Function):
    """x n gain + shift, with n = 1 / rms(x); gain and shift are of a sample, or of each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor | None, eps: float) -> Tensor:
        """Compute it in two passes."""
        n = inverse_rms(x, eps)
        ctx.save_for_backward(x, gain, n)
        ctx.has_shift = shift is not None
        y = x * n
        return y.mul_(gain) if shift is None else addcmul(shift, y, gain, out=y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Keep x alone for it, which the residual connection keeps as well."""
        [g], (x, gain, n) = grads, ctx.saved_tensors
        product, d_shift = g * x, g if ctx.has_shift else None
        if gain.shape[1] == 1:  # as matrix products, of one pass each
            dot, d_gain = product @ gain.mT, n.mT @ product
            d_shift = d_shift if d_shift is None else d_shift.sum(1, keepdim=True)
        else:
            d_gain = product * n
            dot = product.mul_(gain).sum(-1, keepdim=True)
        d_x = (g * gain).addcmul_(x, dot.mul_(n.square().div_(-x.shape[-1]))).mul_(n)
        return d_x, d_gain, d_shift, None


def inverse_rms(x: Float[Tensor, "*batch dim"], eps: float) -> Float[Tensor, "*batch 1"]:
    """Compute 1 / sqrt(mean(x^2) + eps) over the last axis."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
