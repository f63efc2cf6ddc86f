"""Noise levels of SD3's sampler (arXiv 2403.03206, section 5.3.2), and Euler's method along them.

The schedule is diffusers' own class: its rounding, in the order in which it happens, decides the
last digits of the times that the network is told.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from udiff.system import Guidance, Query, Steps

MAX_SHIFT = 1.16
"""Of dynamic shifting where a scheduler's configuration says nothing: the pipeline's own."""


class Levels(NamedTuple):
    """What a sampling visits: noise levels from 1 to 0, and as what the network is told them."""

    sigmas: Float[Tensor, " levels"]
    """One more than the steps: the last is 0."""
    timesteps: Float[Tensor, " steps"]


def noise_levels(
    scheduler: Any,
    *,
    num_steps: int,
    num_tokens: int,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Levels:
    """Compute the noise levels of a sampling.

    Args:
        scheduler: diffusers' `FlowMatchEulerDiscreteScheduler` (which has no types).
        num_steps: network calls; `sigmas` count instead where they are given.
        num_tokens: of the latent, for dynamic shifting.
        sigmas: levels from which the shift is still to be made.
        mu: logarithm of the dynamic shift, in place of what follows from `num_tokens`.
    """
    if scheduler.config.use_dynamic_shifting:
        mu = dynamic_mu(num_tokens, scheduler.config) if mu is None else mu
    else:
        mu = None
    if sigmas is not None:
        scheduler.set_timesteps(sigmas=list(sigmas), mu=mu)
    else:
        scheduler.set_timesteps(num_steps, mu=mu)
    return Levels(scheduler.sigmas, scheduler.timesteps)


def dynamic_mu(num_tokens: int, config: Any) -> float:
    """Interpolate mu linearly in the number of a latent's tokens."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", MAX_SHIFT)
    slope = (top - base) / (high - low)
    return num_tokens * slope + (base - slope * low)


def descend(noise: Float[Tensor, "..."], levels: Levels) -> Steps:
    """Follow the velocity (noise minus data) from noise to data by Euler steps; a query a step.

    Queries are told the timestep, 1000 x noise level.
    """
    x = noise
    steps = pairwise(levels.sigmas.tolist())
    for (sigma, sigma_next), timestep in zip(steps, levels.timesteps.tolist(), strict=True):
        velocity = yield Query(x, timestep)
        x = x + (sigma_next - sigma) * velocity
    return x


def make_guidance(scale: float) -> Guidance:
    """Guide all channels at all times; officially only where the scale is above 1."""
    return Guidance(scale if scale > 1 else 1.0)
