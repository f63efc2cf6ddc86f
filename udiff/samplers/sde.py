"""Stochastic sampling: the reverse diffusion with the marginals of a path (arXiv 2401.08740).

dx = (v + w s) dt + sqrt(2 w) dW, where the score s follows from the velocity v, and the diffusion
w(t) >= 0 can be chosen freely; w = 0 is the ODE.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.parameterization import SCORE, VELOCITY, convert
from udiff.diffusion.path import Coefficients, Path
from udiff.system import Query, Steps

Times = Float[Tensor, "*times"]
Diffusion = Callable[[Times, Coefficients], Times]
"""w at times of which the path's coefficients are given."""


def path_diffusion(t: Times, point: Coefficients, *, norm: float) -> Times:
    """Diffuse as the path does read backwards (Song's SBDM); infinite at t = 0 of most paths."""
    return norm * point.diffusivity


def sigma_diffusion(t: Times, point: Coefficients, *, norm: float) -> Times:
    """Diffuse in proportion to the noise."""
    return norm * point.sigma


def linear_diffusion(t: Times, point: Coefficients, *, norm: float) -> Times:
    """Diffuse less and less."""
    return norm * (1 - t)


def decreasing_diffusion(t: Times, point: Coefficients, *, norm: float) -> Times:
    """Diffuse less and less, along a squared cosine."""
    return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2


def middle_diffusion(t: Times, point: Coefficients, *, norm: float) -> Times:
    """Diffuse most in the middle ("increasing-decreasing")."""
    return norm * torch.sin(math.pi * t) ** 2


def constant_diffusion(t: Times, point: Coefficients, *, norm: float) -> Times:
    """Diffuse alike at all times."""
    return torch.full_like(t, norm)


class Reverse:
    """A path and its diffusion, at single times."""

    def __init__(self, path: Path, diffusion: Diffusion) -> None:
        self.path = path
        self.diffusion = diffusion

    def score(self, velocity: Tensor, x: Tensor, t: float) -> Tensor:
        """Compute the score that a velocity means."""
        point = self.path.at(_scalar(t))
        return convert(velocity, x, point, source=VELOCITY, target=SCORE)

    def drift(self, velocity: Tensor, x: Tensor, t: float) -> Tensor:
        """Compute v + w s."""
        return velocity + self.rate(t) * self.score(velocity, x, t)

    def rate(self, t: float) -> Tensor:
        """Compute w."""
        return self.diffusion(_scalar(t), self.path.at(_scalar(t)))


def euler_maruyama(
    noise: Float[Tensor, "..."],
    times: Float[Tensor, " times"],
    *,
    reverse: Reverse,
    normals: Iterator[Float[Tensor, "..."]],
) -> Steps:
    """Take Euler-Maruyama steps along `times`; one query a step, which is sent the velocity.

    `normals` gives one standard normal a step, shaped like x.
    """
    x = noise
    for t, t_next in pairwise(times.tolist()):
        step = t_next - t
        velocity = yield Query(x, t)
        kick = (2 * reverse.rate(t) * step).sqrt() * next(normals)
        x = x + step * reverse.drift(velocity, x, t) + kick
    return x


def stochastic_heun(
    noise: Float[Tensor, "..."],
    times: Float[Tensor, " times"],
    *,
    reverse: Reverse,
    normals: Iterator[Float[Tensor, "..."]],
) -> Steps:
    """Add a step's noise first, then take a Heun step of the drift; two queries a step.

    A step to t = 1, where no score is finite, takes the drift at its start alone.
    """
    x = noise
    for t, t_next in pairwise(times.tolist()):
        step = t_next - t
        x = x + (2 * reverse.rate(t) * step).sqrt() * next(normals)
        drift = reverse.drift((yield Query(x, t)), x, t)
        ahead = x + step * drift
        if t_next < 1:
            drift_next = reverse.drift((yield Query(ahead, t_next)), ahead, t_next)
            ahead = x + step / 2 * (drift + drift_next)
        x = ahead
    return x


LastStep = Callable[[Tensor, Tensor, float], Tensor]
"""From x and its velocity at a time to the sample."""


def finish(steps: Steps, t: float, last: LastStep) -> Steps:
    """Follow a sampler that ends at `t` by one step without noise; one query more."""
    x = yield from steps
    velocity = yield Query(x, t)
    return last(x, velocity, t)


def mean_step(x: Tensor, velocity: Tensor, t: float, *, reverse: Reverse) -> Tensor:
    """Step to t = 1 along the drift of the SDE."""
    return x + (1 - t) * reverse.drift(velocity, x, t)


def ode_step(x: Tensor, velocity: Tensor, t: float) -> Tensor:
    """Step to t = 1 along the velocity."""
    return x + (1 - t) * velocity


def tweedie_step(x: Tensor, velocity: Tensor, t: float, *, reverse: Reverse) -> Tensor:
    """Take the mean of the data given x: x / alpha + sigma^2 / alpha s."""
    return VELOCITY.ends(velocity, x, reverse.path.at(_scalar(t))).data


def _scalar(t: float) -> Float[Tensor, ""]:
    # Float64 without axes: exact coefficients, and x keeps its dtype and its device.
    return torch.tensor(t, dtype=torch.float64)
