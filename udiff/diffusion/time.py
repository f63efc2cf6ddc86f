"""Which times a training step sees; t is in [0, 1], 0 = noise."""

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from udiff.system import LocalRng


@runtime_checkable
class TimeDistribution(Protocol):
    """Draws one time per sample."""

    def draw(self, num_rows: int, rng: LocalRng) -> Float[Tensor, " batch"]: ...  # noqa: D102


class UniformTime:
    """All times alike."""

    def draw(self, num_rows: int, rng: LocalRng) -> Float[Tensor, " batch"]:
        """Draw from [0, 1)."""
        return rng.uniform(num_rows)


@dataclass(frozen=True)
class LogitNormalTime:
    """t = sigmoid(mean + n), n standard normal: mostly middling noise.

    arXiv 2403.03206, equation 19; a positive mean moves times towards data.
    """

    mean: float = 0.0

    def draw(self, num_rows: int, rng: LocalRng) -> Float[Tensor, " batch"]:
        """Draw from (0, 1)."""
        return (self.mean + rng.normal(num_rows)).sigmoid().float()

    def density(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """Compute the probability density at times inside (0, 1)."""
        normal = torch.exp(-0.5 * (torch.logit(t) - self.mean) ** 2) / math.sqrt(2 * math.pi)
        return normal / (t * (1 - t))


@dataclass(frozen=True)
class ShiftedTime:
    """Another distribution's times, moved to t / (t + (1 - t) shift); above 1 is towards noise."""

    time: TimeDistribution
    shift: float

    def draw(self, num_rows: int, rng: LocalRng) -> Float[Tensor, " batch"]:
        """Draw from [0, 1]."""
        t = self.time.draw(num_rows, rng)
        return t / (t + (1 - t) * self.shift)


@dataclass(frozen=True)
class Rescaled:
    """Another distribution's times, mapped from [0, 1] to [low, high]."""

    time: TimeDistribution
    low: float
    high: float

    def draw(self, num_rows: int, rng: LocalRng) -> Float[Tensor, " batch"]:
        """Draw from [low, high]."""
        return self.time.draw(num_rows, rng) * (self.high - self.low) + self.low


@dataclass(frozen=True)
class Restricted:
    """Another distribution's times; with probability `prob`, a whole batch's lie in [low, high]."""

    time: TimeDistribution
    low: float
    high: float
    prob: float = 1.0

    def draw(self, num_rows: int, rng: LocalRng) -> Float[Tensor, " batch"]:
        """Draw batches until enough times lie in the range; those are kept in order.

        The global batch is drawn on every rank, so that all agree on how many draws that takes.
        """
        whole = replace(rng, rank=0, world_size=1)
        total = num_rows * rng.world_size
        if self.prob < 1 and whole.uniform(1).item() >= self.prob:
            return self.time.draw(num_rows, rng)
        kept = torch.empty(0, device=rng.generator.device)
        while len(kept) < total:
            t = self.time.draw(total, whole)
            kept = torch.cat([kept, t[(t >= self.low) & (t <= self.high)]])
        return kept[:total][rng.rank :: rng.world_size]
