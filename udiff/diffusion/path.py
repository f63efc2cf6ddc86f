"""Paths between noise (t = 0) and data (t = 1): x_t = alpha(t) data + sigma(t) noise."""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


class Coefficients(NamedTuple):
    """A path at some times: alpha, sigma and their derivatives in t."""

    alpha: Float[Tensor, "*times"]
    sigma: Float[Tensor, "*times"]
    alpha_dot: Float[Tensor, "*times"]
    sigma_dot: Float[Tensor, "*times"]
    log_alpha_dot: Float[Tensor, "*times"]
    """Derivative of log alpha; infinite where the data has no part in x_t."""

    @property
    def diffusivity(self) -> Float[Tensor, "*times"]:
        """V of the path read backwards as a diffusion: half of its squared noise rate.

        V = (alpha_dot / alpha) sigma^2 - sigma sigma_dot (arXiv 2401.08740, section 2.4).
        """
        return self.log_alpha_dot * self.sigma**2 - self.sigma * self.sigma_dot

    def place(
        self, data: Float[Tensor, "..."], noise: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Compute x_t between data and noise."""
        return self.alpha * data + self.sigma * noise


@runtime_checkable
class Path(Protocol):
    """How much noise and how much data a time stands for."""

    def at(self, t: Float[Tensor, "*times"]) -> Coefficients:
        """Compute the coefficients at times in [0, 1], in their shape and dtype."""


class LinearPath:
    """The straight path alpha = t, sigma = 1 - t (arXiv 2209.03003, equation 1)."""

    def at(self, t: Float[Tensor, "*times"]) -> Coefficients:
        """Compute the coefficients; the derivatives are 1 and -1."""
        one = torch.ones_like(t)
        return Coefficients(t, 1 - t, one, -one, 1 / t)


class GVPPath:
    """The path of constant variance, alpha = sin(pi t / 2), sigma = cos(pi t / 2).

    arXiv 2401.08740, section 2.2 (with t reversed).
    """

    def at(self, t: Float[Tensor, "*times"]) -> Coefficients:
        """Compute the coefficients."""
        rate = math.pi / 2
        alpha, sigma = torch.sin(rate * t), torch.cos(rate * t)
        return Coefficients(alpha, sigma, rate * sigma, -rate * alpha, rate / torch.tan(rate * t))


class VPPath:
    """The variance-preserving diffusion with a linear noise rate (arXiv 2011.13456, equation 32).

    alpha = exp(m), sigma^2 = 1 - exp(2 m), with m' = beta / 2 and beta falling from 20 to 0.1.
    sigma_dot is infinite at t = 1.
    """

    beta_min, beta_max = 0.1, 20.0

    def at(self, t: Float[Tensor, "*times"]) -> Coefficients:
        """Compute the coefficients."""
        span = self.beta_max - self.beta_min
        log_alpha = -((1 - t) ** 2) * span / 4 - (1 - t) * self.beta_min / 2
        log_alpha_dot = ((1 - t) * span + self.beta_min) / 2
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        sigma_dot = -(alpha**2) * log_alpha_dot / sigma
        return Coefficients(alpha, sigma, alpha * log_alpha_dot, sigma_dot, log_alpha_dot)


def per_sample(
    t: Float[Tensor, " batch"], like: Float[Tensor, "batch ..."]
) -> Float[Tensor, "batch ..."]:
    """Shape one value per sample so that it multiplies `like`."""
    return t.view(-1, *[1] * (like.ndim - 1))
