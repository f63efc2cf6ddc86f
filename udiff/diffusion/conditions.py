"""Conditions that a denoiser is trained with, and how they are dropped for guidance."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from udiff.system import Batch, Draws, StepRng


@dataclass(frozen=True)
class LabelDropout:
    """Class labels, each replaced by the null label with probability `prob` (arXiv 2207.12598)."""

    null_label: int
    prob: float
    names: ClassVar[tuple[str, ...]] = ("label",)

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Decide which samples keep their label."""
        label = batch["label"]
        return {"label": self.drop(label, rng.local.uniform(len(label)))}

    def drop(self, label: Tensor, uniform: Tensor) -> Tensor:
        """Replace the labels whose uniform draw lies below `prob`."""
        return label.masked_fill(uniform < self.prob, self.null_label)
