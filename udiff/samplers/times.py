"""Time grids of samplers, from 0 (noise) to 1 (data)."""

import torch
from jaxtyping import Float
from torch import Tensor


def time_grid(
    num_steps: int, *, last_step: float | None = None, shift: float = 1.0
) -> Float[Tensor, " times"]:
    """Compute `num_steps + 1` increasing times, evenly spaced but for the last step and the shift.

    Args:
        num_steps: network calls of a first-order sampler.
        last_step: length of the last step before the shift; 1 / num_steps where left open.
        shift: moves t to t / (t + (1 - t) shift); above 1 spends more steps near noise.

    Raises:
        ValueError: a value is out of its range.
    """
    if num_steps < 1:
        raise ValueError(f"sampling.num_steps must be at least 1, got {num_steps}")
    if shift <= 0:
        raise ValueError(f"sampling.shift must be > 0, got {shift}; 1 is no shift")
    last = last_step if last_step is not None and num_steps > 1 else 1 / num_steps
    times = torch.cat([torch.linspace(0, 1 - last, num_steps), torch.ones(1)])
    return times / (times + (1 - times) * shift)
