"""Gradients of one length: an objective says where to go, not how far."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from udiff.diffusion.objective import Network, Objective
from udiff.system import Batch, Draws, Losses, Prediction, StepRng

_MARGIN = 1e-8


@dataclass(frozen=True)
class UnitGradient:
    """Scale the gradient of the network's output to length 1, over the whole micro-batch.

    Losses and samples are those of the objective. A weight that its loss has in a sum makes no
    difference any more: every micro-batch of every rank has a gradient of the same length there.
    """

    objective: Objective

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw what the objective does."""
        return self.objective.draw(batch, rng)

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the losses."""

        def ask(*inputs: Any, **conditions: Any) -> Prediction:
            prediction = network(*inputs, **conditions)
            output = prediction.output.view_as(prediction.output)
            if output.requires_grad:
                output.register_hook(_normalize)
            return prediction._replace(output=output)

        return self.objective(ask, batch, draws)


def _normalize(gradient: Tensor) -> Tensor:
    return gradient / (gradient.norm() + _MARGIN)
