"""What a network predicts, velocity, noise, data or score, and how one is turned into another.

x_t = alpha data + sigma noise is one equation for the two ends of the path; a prediction is the
other. Whatever is predicted, both ends follow, and from the ends anything that could be predicted.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.path import Coefficients


class Ends(NamedTuple):
    """The data and the noise between which x_t lies."""

    data: Float[Tensor, "..."]
    noise: Float[Tensor, "..."]


@runtime_checkable
class Parameterization(Protocol):
    """One thing that a network can predict."""

    name: str

    def target(self, ends: Ends, point: Coefficients) -> Float[Tensor, "..."]:
        """Compute what the network should have predicted."""

    def ends(
        self, output: Float[Tensor, "..."], x_t: Float[Tensor, "..."], point: Coefficients
    ) -> Ends:
        """Solve for the data and the noise that a prediction means."""

    def residual(
        self, output: Float[Tensor, "..."], ends: Ends, point: Coefficients
    ) -> Float[Tensor, "..."]:
        """Compute the error whose square is learned from."""


class VelocityPrediction:
    """alpha_dot data + sigma_dot noise."""

    name = "velocity"

    def target(self, ends: Ends, point: Coefficients) -> Float[Tensor, "..."]:
        """Compute the velocity."""
        return point.alpha_dot * ends.data + point.sigma_dot * ends.noise

    def ends(
        self, output: Float[Tensor, "..."], x_t: Float[Tensor, "..."], point: Coefficients
    ) -> Ends:
        """Solve by Cramer's rule, which divides by no coefficient that becomes 0."""
        determinant = point.alpha_dot * point.sigma - point.alpha * point.sigma_dot
        return Ends(
            (point.sigma * output - point.sigma_dot * x_t) / determinant,
            (point.alpha_dot * x_t - point.alpha * output) / determinant,
        )

    def residual(
        self, output: Float[Tensor, "..."], ends: Ends, point: Coefficients
    ) -> Float[Tensor, "..."]:
        """Compute the error of the velocity."""
        return output - self.target(ends, point)


class NoisePrediction:
    """The noise in x_t (arXiv 2006.11239)."""

    name = "noise"

    def target(self, ends: Ends, point: Coefficients) -> Float[Tensor, "..."]:
        """Return the noise."""
        return ends.noise

    def ends(
        self, output: Float[Tensor, "..."], x_t: Float[Tensor, "..."], point: Coefficients
    ) -> Ends:
        """Solve; impossible at t = 0, where x_t says nothing of the data."""
        return Ends((x_t - point.sigma * output) / point.alpha, output)

    def residual(
        self, output: Float[Tensor, "..."], ends: Ends, point: Coefficients
    ) -> Float[Tensor, "..."]:
        """Compute the error of the noise."""
        return output - ends.noise


class DataPrediction:
    """The data."""

    name = "data"

    def target(self, ends: Ends, point: Coefficients) -> Float[Tensor, "..."]:
        """Return the data."""
        return ends.data

    def ends(
        self, output: Float[Tensor, "..."], x_t: Float[Tensor, "..."], point: Coefficients
    ) -> Ends:
        """Solve; impossible at t = 1, where x_t says nothing of the noise."""
        return Ends(output, (x_t - point.alpha * output) / point.sigma)

    def residual(
        self, output: Float[Tensor, "..."], ends: Ends, point: Coefficients
    ) -> Float[Tensor, "..."]:
        """Compute the error of the data."""
        return output - ends.data


class ScorePrediction:
    """The gradient of the log density, -noise / sigma (arXiv 2011.13456)."""

    name = "score"

    def target(self, ends: Ends, point: Coefficients) -> Float[Tensor, "..."]:
        """Compute the score; infinite at t = 1."""
        return -ends.noise / point.sigma

    def ends(
        self, output: Float[Tensor, "..."], x_t: Float[Tensor, "..."], point: Coefficients
    ) -> Ends:
        """Solve; impossible at t = 0, where x_t says nothing of the data."""
        return NOISE.ends(-point.sigma * output, x_t, point)

    def residual(
        self, output: Float[Tensor, "..."], ends: Ends, point: Coefficients
    ) -> Float[Tensor, "..."]:
        """Compute the error times sigma, which stays finite: the error of the noise."""
        return point.sigma * output + ends.noise


VELOCITY, NOISE = VelocityPrediction(), NoisePrediction()
DATA, SCORE = DataPrediction(), ScorePrediction()


def convert(
    output: Float[Tensor, "..."],
    x_t: Float[Tensor, "..."],
    point: Coefficients,
    *,
    source: Parameterization,
    target: Parameterization,
) -> Float[Tensor, "..."]:
    """Turn a prediction of one kind into the prediction of another kind that means the same."""
    if source.name == target.name:
        return output
    return target.target(source.ends(output, x_t, point), point)
