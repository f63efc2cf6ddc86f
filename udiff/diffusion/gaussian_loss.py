"""Losses of Gaussian diffusion: regression and the variational bound (arXiv 2102.09672)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.gaussian import NoiseSchedule
from udiff.diffusion.gaussian_reverse import ReverseProcess
from udiff.diffusion.objective import Network
from udiff.diffusion.timesteps import TimestepDistribution
from udiff.system import Batch, Draws, Losses, StepRng

PerSample = Float[Tensor, " batch"]


class Noised(NamedTuple):
    """A batch on its way to noise."""

    data: Float[Tensor, "batch ..."]
    noise: Float[Tensor, "batch ..."]
    x_t: Float[Tensor, "batch ..."]
    timestep: Int[Tensor, " batch"]


@runtime_checkable
class Term(Protocol):
    """One part of the loss."""

    def __call__(
        self, process: ReverseProcess, output: Float[Tensor, "batch ..."], noised: Noised
    ) -> PerSample:
        """Compute the term of each sample."""


@dataclass(frozen=True)
class GaussianObjective:
    """A sum of terms at timesteps drawn at random."""

    process: ReverseProcess
    timesteps: TimestepDistribution
    conditions: LabelDropout
    terms: Mapping[str, Term]

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw dropped conditions, timestep and noise of each sample."""
        latent = batch["latent"]
        conditions = self.conditions.draw(batch, rng)
        timestep = self.timesteps.draw(len(latent), rng.local)
        return {**conditions, "timestep": timestep, "noise": rng.local.normal(*latent.shape)}

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the loss; `batch["latent"]` is normalized."""
        terms = self.compute_terms(network, batch, draws)
        per_sample = torch.stack(list(terms.values())).sum(0)
        means = {name: term.mean() for name, term in terms.items()}
        return Losses(total=per_sample.mean(), terms=means, per_sample=per_sample)

    def compute_terms(self, network: Network, batch: Batch, draws: Draws) -> dict[str, PerSample]:
        """Compute each term of each sample."""
        data, noise, timestep = batch["latent"], draws["noise"], draws["timestep"]
        x_t = self.process.schedule.add_noise(data, noise, timestep)
        conditions = {name: draws[name] for name in self.conditions.names}
        output = network(x_t, timestep, **conditions).output.float()
        noised = Noised(data, noise, x_t, timestep)
        return {name: term(self.process, output, noised) for name, term in self.terms.items()}


@dataclass(frozen=True)
class SquaredError:
    """Mean squared error of the prediction, weighted by the signal-to-noise ratio."""

    snr_cap: float | None = None
    """gamma of min-SNR-gamma (arXiv 2303.09556); no weight where there is none."""

    def __call__(
        self, process: ReverseProcess, output: Float[Tensor, "batch ..."], noised: Noised
    ) -> PerSample:
        """Compute the error of the prediction; the variance's channels have no part in it."""
        at = process.schedule.at(noised.timestep, output)
        prediction, _ = process.variance.read(output, at)
        target = process.prediction.target(noised.data, noised.noise)
        error = (prediction - target).square().flatten(1).mean(1)
        if self.snr_cap is None:
            return error
        snr = (at.alpha / at.sigma).square().flatten()
        return process.prediction.snr_weight(snr, self.snr_cap) * error


@dataclass(frozen=True)
class VariationalBound:
    """The bound's term at one timestep, in bits per element: a KL, or at timestep 0 a likelihood.

    Data predictions are not clipped, whatever sampling does.
    """

    weight: float = 1.0
    """The number of timesteps makes one term an estimate of the whole bound."""
    learns_mean: bool = False
    """Off, it is the variance's loss alone, and something else is the mean's."""

    def __call__(
        self, process: ReverseProcess, output: Float[Tensor, "batch ..."], noised: Noised
    ) -> PerSample:
        """Compute the term of each sample."""
        reverse = process(output, noised.x_t, noised.timestep)
        mean = reverse.mean if self.learns_mean else reverse.mean.detach()
        at = process.schedule.at(noised.timestep, output)
        true_mean = at.data_coef * noised.data + at.x_t_coef * noised.x_t
        divergence = normal_kl(true_mean, at.posterior_logvar, mean, reverse.logvar)
        likelihood = discretized_log_likelihood(noised.data, mean, reverse.logvar)
        is_last = (noised.timestep == 0).view(-1, *[1] * (mean.ndim - 1))
        nats = torch.where(is_last, -likelihood, divergence).flatten(1).mean(1)
        return self.weight * nats / math.log(2)


def prior_bits(schedule: NoiseSchedule, data: Float[Tensor, "batch ..."]) -> PerSample:
    """Compute KL(q(x_T | data) || N(0, 1)) in bits per element: what no network can change."""
    last = schedule.at(data.new_full((len(data),), len(schedule) - 1, dtype=torch.long), data)
    zero = torch.zeros((), device=data.device)
    divergence = normal_kl(last.alpha * data, 2 * last.sigma.log(), zero, zero)
    return divergence.flatten(1).mean(1) / math.log(2)


def normal_kl(
    mean_p: Float[Tensor, "..."],
    logvar_p: Float[Tensor, "..."],
    mean_q: Float[Tensor, "..."],
    logvar_q: Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    """Compute KL(p || q) of normal distributions, element by element, in nats."""
    spread = -1 + logvar_q - logvar_p + (logvar_p - logvar_q).exp()
    return 0.5 * (spread + (mean_p - mean_q).square() * (-logvar_q).exp())


def discretized_log_likelihood(
    x: Float[Tensor, "..."], mean: Float[Tensor, "..."], logvar: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Compute the log-probability of the bin of width 2 / 255 around x; the outermost are open.

    Made for 8-bit pixels in [-1, 1] (arXiv 2006.11239, equation 13); on latents it is used as is.
    """
    scale = (-0.5 * logvar).exp()
    upper = _normal_cdf(scale * (x - mean + 1 / 255))
    lower = _normal_cdf(scale * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Approximate the normal distribution function by a tanh, as officially."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
