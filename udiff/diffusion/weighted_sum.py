"""Several objectives at once, each on a sub-batch of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from udiff.system import PART_SEPARATOR, Batch, Draws, Losses, StepRng

V = TypeVar("V")


@dataclass(frozen=True)
class Part:
    """An objective bound to its network, and what its loss counts."""

    draw: Callable[[Batch, StepRng], Draws]
    loss: Callable[[Batch, Draws], Losses]
    weight: float = 1.0


class WeightedSum:
    """Add losses of sub-batches up: columns and draws of part `image` are called `image.<name>`.

    Sub-batches have as many rows as one another, so that a batch is cut into micro-batches as any.
    """

    def __init__(self, **parts: Part) -> None:
        self._parts = parts

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw for every part, one after the other."""
        return {
            f"{name}{PART_SEPARATOR}{key}": value
            for name, part in self._parts.items()
            for key, value in part.draw(sub_batch(batch, name), rng).items()
        }

    def __call__(self, batch: Batch, draws: Draws) -> Losses:
        """Compute all losses; the total is their weighted sum, the terms are not weighted."""
        total: Tensor | float = 0.0
        terms: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            losses = part.loss(sub_batch(batch, name), sub_batch(draws, name))
            total = total + part.weight * losses.total
            terms |= {f"{name}_{key}": value for key, value in losses.terms.items()}
        assert isinstance(total, Tensor)
        return Losses(total, terms)


def sub_batch(batch: Mapping[str, V], name: str) -> dict[str, V]:
    """Select the columns of one part, under their own names."""
    prefix = name + PART_SEPARATOR
    return {key.removeprefix(prefix): v for key, v in batch.items() if key.startswith(prefix)}
