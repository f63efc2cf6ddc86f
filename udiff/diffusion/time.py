"""Which times a training step sees; t is in [0, 1], 0 = noise."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from udiff.system import LocalRng


class TimeDistribution(Protocol):
    """Draws one time per sample."""

    def draw(self, num_rows: int, rng: LocalRng) -> Float[Tensor, " batch"]: ...  # noqa: D102


class UniformTime:
    """All times alike."""

    def draw(self, num_rows: int, rng: LocalRng) -> Float[Tensor, " batch"]:
        """Draw from [0, 1)."""
        return rng.uniform(num_rows)


class LogitNormalTime:
    """t = sigmoid(n), n standard normal: mostly middling noise (arXiv 2403.03206, equation 19)."""

    def draw(self, num_rows: int, rng: LocalRng) -> Float[Tensor, " batch"]:
        """Draw from (0, 1)."""
        return rng.normal(num_rows).sigmoid()
