"""Feed-forward layers."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from udiff.nn.norm import by_hand


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        # In the order of official optimizer states, which know parameters by their numbers.
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Apply to each token by itself."""
        return self.w2(silu(self.w1(x)) * self.w3(x))


def gelu_tanh(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Compute GELU's tanh form (arXiv 1606.08415)."""
    return GeluTanh.apply(x) if by_hand(x) else gelu(x, approximate="tanh")


class GeluTanh(torch.autograd.Function):
    """x sigmoid(x (A + B x^2)), the same function: torch's tanh takes six times a sigmoid."""

    A = 2 * (2 / torch.pi) ** 0.5
    B = A * 0.044715

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Compute it."""
        a = x.new_tensor(GeluTanh.A)
        gate = torch.addcmul(a, x, x, value=GeluTanh.B).mul_(x).sigmoid_()
        ctx.save_for_backward(x, gate)
        return gate * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Multiply by gate (1 + y' x (1 - gate)), where y is what the sigmoid is of."""
        x, gate = ctx.saved_tensors
        a = x.new_tensor(GeluTanh.A)
        slope = torch.addcmul(a, x, x, value=3 * GeluTanh.B).mul_(x)
        slope.addcmul_(slope, gate, value=-1)
        return slope.add_(1).mul_(gate).mul_(grads[0])
