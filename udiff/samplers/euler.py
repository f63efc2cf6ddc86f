"""Euler's method."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from udiff.system import Query, Steps


def euler(noise: Float[Tensor, "..."], times: Float[Tensor, " times"]) -> Steps:
    """Integrate dx/dt = v(x, t) from noise to data; len(times) - 1 queries.

    Args:
        noise: x at times[0], unit variance.
        times: increasing from 0 to 1; the velocity sent back has guidance applied already.
    """
    x = noise
    for t, t_next in pairwise(times.tolist()):
        velocity = yield Query(x, t)
        x = x + (t_next - t) * velocity
    return x
