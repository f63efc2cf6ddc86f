"""The reverse process of Gaussian diffusion, p(x_{t-1} | x_t), from a network's answer."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from udiff.diffusion.gaussian import NoiseSchedule, StepTable


class NoisePrediction:
    """The network predicts the noise in x_t."""

    def data(
        self, prediction: Float[Tensor, "..."], x_t: Float[Tensor, "..."], at: StepTable
    ) -> Float[Tensor, "..."]:
        """Compute the data that the prediction implies."""
        return at.recip_alpha * x_t - at.recip_ratio * prediction

    def target(
        self, data: Float[Tensor, "..."], noise: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Say what to predict."""
        return noise

    def snr_weight(self, snr: Float[Tensor, "..."], cap: float) -> Float[Tensor, "..."]:
        """Weight as the data's error at min(snr, cap) (arXiv 2303.09556, section 3.4)."""
        return snr.clamp_max(cap) / snr


class DataPrediction:
    """The network predicts the data."""

    def data(
        self, prediction: Float[Tensor, "..."], x_t: Float[Tensor, "..."], at: StepTable
    ) -> Float[Tensor, "..."]:
        """Return the prediction."""
        return prediction

    def target(
        self, data: Float[Tensor, "..."], noise: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Say what to predict."""
        return data

    def snr_weight(self, snr: Float[Tensor, "..."], cap: float) -> Float[Tensor, "..."]:
        """Weight squared errors by min(snr, cap) (arXiv 2303.09556, equation 7)."""
        return snr.clamp_max(cap)


class NetworkAnswer(NamedTuple):
    """A network's output, taken apart."""

    prediction: Float[Tensor, "..."]
    logvar: Float[Tensor, "..."]
    """Of p(x_{t-1} | x_t); broadcasts to the prediction."""


@runtime_checkable
class Variance(Protocol):
    """Says how wide p(x_{t-1} | x_t) is, and which channels of the output are the prediction."""

    def read(self, output: Float[Tensor, "..."], at: StepTable) -> NetworkAnswer: ...  # noqa: D102


class LearnedRange:
    """Between the posterior's and beta: a second half of the channels says where.

    logvar = f log(beta) + (1 - f) log(posterior) with f = (v + 1) / 2 (arXiv 2102.09672, equation
    15); v is not clamped.
    """

    def read(
        self, output: Float[Tensor, "*batch channels height width"], at: StepTable
    ) -> NetworkAnswer:
        """Split the output and interpolate."""
        prediction, v = output.chunk(2, dim=-3)
        fraction = (v + 1) / 2
        return NetworkAnswer(
            prediction, fraction * at.log_beta + (1 - fraction) * at.posterior_logvar
        )


class FixedLarge:
    """beta, but the posterior's at the last step."""

    def read(self, output: Float[Tensor, "..."], at: StepTable) -> NetworkAnswer:
        """The whole output is the prediction."""
        return NetworkAnswer(output, at.large_logvar)


class FixedSmall:
    """The posterior's."""

    def read(self, output: Float[Tensor, "..."], at: StepTable) -> NetworkAnswer:
        """The whole output is the prediction."""
        return NetworkAnswer(output, at.posterior_logvar)


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t), and the data that it heads for."""

    mean: Float[Tensor, "..."]
    logvar: Float[Tensor, "..."]
    """Broadcasts to the mean."""
    data_pred: Float[Tensor, "..."]


@dataclass(frozen=True)
class ReverseProcess:
    """A schedule, and what a network's output means on it."""

    schedule: NoiseSchedule
    prediction: NoisePrediction | DataPrediction
    variance: Variance

    def spaced(self, timesteps: list[int]) -> "ReverseProcess":
        """Visit only some timesteps."""
        return ReverseProcess(self.schedule.spaced(timesteps), self.prediction, self.variance)

    def __call__(
        self,
        output: Float[Tensor, "..."],
        x_t: Float[Tensor, "..."],
        step: int | Int[Tensor, " batch"],
        *,
        clip: float | None = None,
    ) -> Reverse:
        """Read a network's output for one sample at a step, or for a batch with a step each.

        Args:
            output: of the network, guidance applied.
            x_t: what the network saw.
            step: of this process's schedule.
            clip: largest magnitude of the data prediction; official latents are not clipped.
        """
        at = self.schedule.at(step, x_t)
        prediction, logvar = self.variance.read(output, at)
        data_pred = self.prediction.data(prediction, x_t, at)
        if clip is not None:
            data_pred = data_pred.clamp(-clip, clip)
        mean = at.data_coef * data_pred + at.x_t_coef * x_t
        return Reverse(mean, logvar, data_pred)
