"""Dormand and Prince's adaptive Runge-Kutta method of order 5(4), with Shampine's error estimate.

Step control as in torchdiffeq (its `dopri5`), which can't be used itself: it calls the velocity,
while a sampler here is asked for its next query. Two differences, both for the better: the last
step ends at the end instead of beyond it, and a step ends wherever the velocity jumps.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from udiff.samplers.runge_kutta import advance
from udiff.system import Query, Steps

NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""The last one is the solution of order 5: its slope is the first of the next step."""
EMBEDDED = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
"""Weights of the solution of order 4 (Shampine, 1986, "Some practical Runge-Kutta formulas")."""
ERROR = tuple(b - e for b, e in zip((*STAGES[-1], 0.0), EMBEDDED, strict=True))
SAFETY, LARGEST_GROWTH, SMALLEST_GROWTH = 0.9, 10.0, 0.2


@dataclass(frozen=True)
class Tolerance:
    """Error allowed per step: absolute + relative |x|, as root mean square over the sample."""

    absolute: float
    relative: float

    def measure(self, error: Tensor, *sizes: Tensor) -> float:
        """Compute an error in units of what is allowed."""
        size = sizes[0].abs() if len(sizes) == 1 else sizes[0].abs().maximum(sizes[1].abs())
        scaled = error / (self.absolute + self.relative * size)
        return scaled.square().mean().sqrt().item()


def dopri5(noise: Float[Tensor, "..."], stops: tuple[float, ...], *, tolerance: Tolerance) -> Steps:
    """Integrate dx/dt = v(x, t) with steps as long as the tolerance allows.

    About six queries a step, rejected steps included.

    Args:
        noise: x at the first stop.
        stops: start, end, and between them the times at which the velocity jumps (where guidance
            sets in): no step crosses one, and the velocity there is that after the jump.
        tolerance: per step and sample.

    Raises:
        FloatingPointError: no step is short enough, or the velocity is not finite.
    """
    x, step = noise, None
    for start, end in pairwise(stops):
        x, step = yield from _integrate(x, start, end, step=step, tolerance=tolerance)
    return x


def _integrate(
    x: Tensor, start: float, end: float, *, step: float | None, tolerance: Tolerance
) -> Generator[Query, Tensor, tuple[Tensor, float]]:
    """Go from one stop to the next; returns x there, and the step that seems right beyond."""
    t = start
    slope = yield Query(x, t)
    if step is None:
        step = yield from _first_step(x, t, slope, end=end, tolerance=tolerance)
    while t < end:
        t_next = end if step >= end - t else t + step
        size = t_next - t
        if not t_next > t:
            raise FloatingPointError(f"no step is short enough at t = {t}")
        slopes = [slope]
        for node, weights in zip(NODES, STAGES, strict=True):
            x_next = advance(x, size, weights, slopes)
            slopes.append((yield Query(x_next, _before(end, t + node * size))))
        error = advance(torch.zeros_like(x), size, ERROR, slopes)
        ratio = tolerance.measure(error, x, x_next)
        if ratio <= 1:
            t, x, slope = t_next, x_next, slopes[-1]
        step = size * _growth(ratio)
    return x, step


def _before(end: float, t: float) -> float:
    # The velocity may jump at the end of the interval; inside, only its value before counts.
    return min(t, math.nextafter(end, -math.inf))


def _growth(ratio: float) -> float:
    if ratio == 0:
        return LARGEST_GROWTH
    if not math.isfinite(ratio):
        return SMALLEST_GROWTH
    smallest = 1.0 if ratio < 1 else SMALLEST_GROWTH
    return min(LARGEST_GROWTH, max(SAFETY / ratio**0.2, smallest))


def _first_step(
    x: Tensor, t: float, slope: Tensor, *, end: float, tolerance: Tolerance
) -> Generator[Query, Tensor, float]:
    """Guess a first step (Hairer, Norsett and Wanner, Solving ODEs I, II.4); one query."""
    size, speed = tolerance.measure(x, x), tolerance.measure(slope, x)
    if not math.isfinite(speed):
        raise FloatingPointError(f"the velocity is not finite at t = {t}")
    trial = 1e-6 if min(size, speed) < 1e-5 else 0.01 * size / speed
    trial = min(trial, end - t)
    slope_next = yield Query(x + trial * slope, _before(end, t + trial))
    bend = tolerance.measure(slope_next - slope, x) / trial
    fastest = max(speed, bend)
    guess = max(1e-6, trial * 1e-3) if fastest <= 1e-15 else (0.01 / fastest) ** 0.2
    return min(100 * trial, guess)
