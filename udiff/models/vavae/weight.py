"""Weights of losses that are balanced against the reconstruction (arXiv 2012.09841, equation 7)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

Scalar = Float[Tensor, ""]


LossWeight = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Weighs a loss, given the reconstruction's, it, and a layer that both depend on."""


@dataclass(frozen=True)
class FixedWeight:
    """The same weight at all times."""

    value: float

    def __call__(self, nll: Scalar, loss: Scalar, layer: Tensor) -> Scalar:
        """Give the weight."""
        return nll.new_tensor(self.value)


@dataclass(frozen=True)
class AdaptiveWeight:
    """`value` times |d nll / d layer| / (|d loss / d layer| + 1e-4), of which no gradient is taken.

    Both gradients are averaged between the ranks before their norms are taken, so that every rank
    has the same weight, that of the whole global batch (of a micro-batch of it, where batches are
    accumulated). The published code weighs on each rank by its own pictures.
    """

    value: float
    limit: float
    """Largest ratio."""

    def __call__(self, nll: Scalar, loss: Scalar, layer: Tensor) -> Scalar:
        """Compute the weight; 0 where there are no gradients (in evaluation)."""
        if not torch.is_grad_enabled():
            return nll.new_zeros(())
        norms = [_gradient(of, layer).norm() for of in (nll, loss)]
        return self.value * (norms[0] / (norms[1] + 1e-4)).clamp(0, self.limit).detach()


def differentiate_once(loss: Scalar, pixels: Tensor) -> Scalar:
    """Compute now the gradient of a loss of pictures, however often it will be asked for.

    The loss that is returned has this value and, through `pixels`, this gradient: balancing two
    weights and learning need three, and only one backward pass of the network that judges.
    """
    if not torch.is_grad_enabled():
        return loss
    (gradient,) = torch.autograd.grad(loss, pixels)
    return loss.detach() + (gradient * (pixels - pixels.detach())).sum()


def _gradient(loss: Scalar, layer: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, layer, retain_graph=True)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient
