"""Several objectives on one network, whose gradients a step adds up (arXiv 2211.08332).

Which of them a step takes is drawn from what all ranks share: it decides which code runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from udiff.diffusion.objective import Network, Objective
from udiff.system import Batch, Draws, Losses, StepRng

_JOIN = "/"


@dataclass(frozen=True)
class FlowMixture:
    """A weighted sum of the losses of some flows, all of them or as many as are drawn."""

    flows: Mapping[str, Objective]
    weights: Mapping[str, float]
    """Of each flow's loss."""
    num_drawn: int
    """Different flows that a step takes."""

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw which flows the step takes, and what each of them draws; others have no draws."""
        names = list(self.flows)
        chosen = torch.randperm(len(names), generator=rng.shared)[: self.num_drawn]
        return {
            f"{names[number]}{_JOIN}{key}": value
            for number in sorted(chosen.tolist())
            for key, value in self.flows[names[number]].draw(batch, rng).items()
        }

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the weighted sum; each flow's terms have its name in front."""
        losses = {
            name: self.flows[name](network, batch, _own(draws, name)) for name in self.taken(draws)
        }
        total = torch.stack([self.weights[name] * loss.total for name, loss in losses.items()])
        terms = {f"{name}_{key}": term for name, loss in losses.items() for key, term in
                 loss.terms.items()}  # fmt: skip
        return Losses(total.sum(), terms)

    def taken(self, draws: Draws) -> tuple[str, ...]:
        """Name the flows that a step takes."""
        return tuple(name for name in self.flows if _own(draws, name))


def _own(draws: Draws, name: str) -> Draws:
    prefix = name + _JOIN
    return {
        key.removeprefix(prefix): value for key, value in draws.items() if key.startswith(prefix)
    }
