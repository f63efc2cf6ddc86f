"""Adams-Bashforth multistep methods on uneven times."""

from collections import deque
from collections.abc import Callable
from itertools import accumulate, pairwise
from math import prod

from jaxtyping import Float, Float64
from torch import Tensor

from udiff.system import Query, Steps

Clock = Callable[[Float64[Tensor, " times"]], Float64[Tensor, " times"]]
"""A function of time, in terms of which velocities are interpolated by polynomials."""

MAX_ORDER = 4


def time_itself(t: Float64[Tensor, " times"]) -> Float64[Tensor, " times"]:
    """Interpolate in time."""
    return t


def snr(t: Float64[Tensor, " times"]) -> Float64[Tensor, " times"]:
    """Interpolate in alpha / sigma of the linear path."""
    return t.clamp_min(1e-8) / (1 - t + 1e-8)


def inverse_snr(t: Float64[Tensor, " times"]) -> Float64[Tensor, " times"]:
    """Interpolate in sigma / alpha."""
    return 1 / snr(t)


def log_snr(t: Float64[Tensor, " times"]) -> Float64[Tensor, " times"]:
    """Interpolate in log(alpha / sigma), kept finite at both ends."""
    return (t.clamp_min(1e-3) / (1 - t + 1e-3)).log()


def adams(
    noise: Float[Tensor, "..."],
    times: Float[Tensor, " times"],
    *,
    order: int,
    clock: Clock = time_itself,
) -> Steps:
    """Integrate dx/dt = v(x, t) by polynomials through the last `order` velocities; a query a step.

    The first steps have fewer velocities, and so a lower order.

    Args:
        noise: x at times[0], unit variance.
        times: increasing from 0 to 1.
        order: 1 (Euler) to 4.
        clock: what the polynomial is a function of; steps are always in time.

    Raises:
        ValueError: there is no such order.
    """
    coefficients = adams_coefficients(times, order=order, clock=clock)
    # Officially the network is given the sum of the steps so far, in float32.
    queried = accumulate(times.diff(), initial=times[0])
    x, velocities = noise, deque[Tensor](maxlen=order)
    for t, row, step in zip(queried, coefficients, times.diff().tolist(), strict=False):
        velocities.append((yield Query(x, t.item())))
        for weight, velocity in zip(row, velocities, strict=True):
            x = x + (step * weight) * velocity
    return x


def adams_coefficients(
    times: Float[Tensor, " times"], *, order: int, clock: Clock = time_itself
) -> list[list[float]]:
    """Compute each step's weights of the velocities at its last `order` times, oldest first.

    They are the means over the step of the Lagrange polynomials on those times, and so sum to 1:
    the exact value of what the published code computes in float32.
    """
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"sampling.order must be in 1..{MAX_ORDER}, got {order}")
    ticks = clock(times.double()).tolist()
    rows = []
    for index, (start, end) in enumerate(pairwise(ticks)):
        nodes = ticks[max(0, index + 1 - order) : index + 1]
        # Gauss's rule with two points is exact up to degree 3, that is to order 4.
        middle, reach = (start + end) / 2, (end - start) / 2 / 3**0.5
        rows.append(
            [
                (_lagrange(nodes, j, middle - reach) + _lagrange(nodes, j, middle + reach)) / 2
                for j in range(len(nodes))
            ]
        )
    return rows


def _lagrange(nodes: list[float], index: int, at: float) -> float:
    """Evaluate the polynomial that is 1 at one node and 0 at the others."""
    others = [node for j, node in enumerate(nodes) if j != index]
    return prod(((at - node) / (nodes[index] - node) for node in others), start=1.0)
