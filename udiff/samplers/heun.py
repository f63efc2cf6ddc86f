"""Heun's method of order 2."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from udiff.system import Query, Steps


def heun(noise: Float[Tensor, "..."], times: Float[Tensor, " times"]) -> Steps:
    """Integrate dx/dt = v(x, t) with the mean of the velocities at both ends of an Euler step.

    Two queries a step; arguments as for `euler`.
    """
    x = noise
    for t, t_next in pairwise(times.tolist()):
        step = t_next - t
        velocity = yield Query(x, t)
        velocity_next = yield Query(x + step * velocity, t_next)
        x = x + step / 2 * (velocity + velocity_next)
    return x
