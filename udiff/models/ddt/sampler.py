"""DDT's samplers: step rules of the reverse SDE, Euler and Heun along them, and their choice.

dx = v dt + a w s dt + b sqrt(w dt) z, where the score s follows from the velocity and w(t) >= 0 can
be chosen freely. Times run from 0 (noise) to 1 (data).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.path import LinearPath
from udiff.models.ddt.settings import DDTSampling
from udiff.samplers.adams import Clock, adams, inverse_snr, log_snr, snr, time_itself
from udiff.samplers.euler import euler
from udiff.samplers.sde import Diffusion, Reverse, constant_diffusion, linear_diffusion
from udiff.system import Guidance, Query, Steps


class Slope(NamedTuple):
    """Where a sample goes: its velocity, and the score that the velocity means."""

    velocity: Tensor
    score: Tensor

    def mean(self, other: "Slope") -> "Slope":
        """Average two slopes."""
        return Slope((self.velocity + other.velocity) / 2, (self.score + other.score) / 2)


@dataclass(frozen=True)
class StepRule:
    """One kind of step: which parts of the score and of fresh noise it takes in."""

    score: float
    """a: of w s dt."""
    noise: float
    """b: of sqrt(w dt) z."""

    def __call__(
        self, x: Tensor, slope: Slope, *, step: float, diffusion: Tensor, normals: Iterator[Tensor]
    ) -> Tensor:
        """Step from x; takes one standard normal if the rule has noise."""
        x = x + step * slope.velocity
        if self.score:
            x = x + (self.score * step * diffusion) * slope.score
        if self.noise:
            x = x + self.noise * (step * diffusion).sqrt() * next(normals)
        return x


STEP_RULES = {
    "ode": StepRule(score=0.0, noise=0.0),
    "sde_mean": StepRule(score=1.0, noise=0.0),
    "sde": StepRule(score=1.0, noise=math.sqrt(2)),
    "sde_preserve": StepRule(score=0.5, noise=1.0),
}
DIFFUSIONS: dict[str, Diffusion] = {
    "linear": partial(linear_diffusion, norm=1.0),
    "constant": partial(constant_diffusion, norm=1.0),
}
CLOCKS: dict[str, Clock] = {
    "time": time_itself,
    "snr": snr,
    "inverse_snr": inverse_snr,
    "log_snr": log_snr,
}


@dataclass(frozen=True)
class Stepper:
    """How the samplers below step: all alike but for the last."""

    rule: StepRule
    last: StepRule
    reverse: Reverse
    normals: Iterator[Tensor]

    def slope(self, velocity: Tensor, x: Tensor, t: float) -> Slope:
        """Find the slope that a velocity at x means."""
        return Slope(velocity, self.reverse.score(velocity, x, t))

    def step(self, x: Tensor, slope: Slope, t: float, t_next: float) -> Tensor:
        """Step to the next time; from there to the data by the last rule."""
        rule = self.last if t_next == 1 else self.rule
        diffusion = self.reverse.rate(t)
        return rule(x, slope, step=t_next - t, diffusion=diffusion, normals=self.normals)


def euler_steps(
    noise: Float[Tensor, "..."], times: Float[Tensor, " times"], stepper: Stepper
) -> Steps:
    """Take one step for each query."""
    x = noise
    for t, t_next in pairwise(times.tolist()):
        slope = stepper.slope((yield Query(x, t)), x, t)
        x = stepper.step(x, slope, t, t_next)
    return x


def heun_steps(
    noise: Float[Tensor, "..."],
    times: Float[Tensor, " times"],
    stepper: Stepper,
    *,
    is_exact: bool,
) -> Steps:
    """Correct every step but the last by the slope at its end; noise is fresh in the correction.

    One query a step where the next step starts with the slope found at the end of the uncorrected
    one, as published; two, but one for the last step, where `is_exact` has it asked for anew.
    """
    x, slope = noise, None
    for t, t_next in pairwise(times.tolist()):
        if slope is None or is_exact:
            slope = stepper.slope((yield Query(x, t)), x, t)
        ahead = stepper.step(x, slope, t, t_next)
        if t_next == 1:
            return ahead
        slope_next = stepper.slope((yield Query(ahead, t_next)), ahead, t_next)
        x, slope = stepper.step(x, slope.mean(slope_next), t, t_next), slope_next
    return x


def make_sampler(
    settings: DDTSampling,
    noise: Float[Tensor, "..."],
    times: Float[Tensor, " times"],
    normals: Iterator[Float[Tensor, "..."]],
) -> Steps:
    """Begin to sample; `normals` gives standard normals shaped like `noise`."""
    if settings.solver == "adams":
        return adams(noise, times, order=settings.order, clock=CLOCKS[settings.clock])
    if settings.solver == "euler" and (settings.step, settings.last) == ("ode", "ode"):
        return euler(noise, times)
    stepper = Stepper(
        STEP_RULES[settings.step],
        STEP_RULES[settings.last],
        Reverse(LinearPath(), DIFFUSIONS[settings.diffusion]),
        normals,
    )
    if settings.solver == "euler":
        return euler_steps(noise, times, stepper)
    return heun_steps(noise, times, stepper, is_exact=settings.is_exact)


def make_guidance(settings: DDTSampling, scale: float) -> Guidance:
    """Translate the settings; times are compared in float32, as they reach the network."""
    interval = settings.guidance_interval
    first, end = settings.guidance_channels
    return Guidance(
        scale,
        interval and (float(np.float32(interval[0])), float(np.float32(interval[1]))),
        channels=end,
        first_channel=first,
        other_scale=settings.guidance_other_scale,
    )
