"""Paths between noise (t = 0) and data (t = 1): x_t = alpha(t) data + sigma(t) noise."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class PathPoint(NamedTuple):
    """A noised sample and how fast it moves along its path."""

    x_t: Float[Tensor, "batch ..."]
    velocity: Float[Tensor, "batch ..."]


class LinearPath:
    """The straight path alpha = t, sigma = 1 - t (arXiv 2209.03003, equation 1)."""

    def interpolate(
        self,
        data: Float[Tensor, "batch ..."],
        noise: Float[Tensor, "batch ..."],
        t: Float[Tensor, " batch"],
    ) -> PathPoint:
        """Place each sample at its time; the velocity is data minus noise."""
        t = t.view(-1, *[1] * (data.ndim - 1))
        return PathPoint(t * data + (1 - t) * noise, data - noise)
