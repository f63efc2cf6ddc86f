"""Explicit Runge-Kutta methods with fixed steps."""

from itertools import pairwise
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from udiff.system import Query, Steps


class Tableau(NamedTuple):
    """A Butcher tableau: places of the stages, their weights of earlier slopes, the sum's."""

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


MIDPOINT = Tableau((0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0))
HEUN3 = Tableau(
    (0.0, 1 / 3, 2 / 3),
    ((), (1 / 3,), (0.0, 2 / 3)),
    (1 / 4, 0.0, 3 / 4),
)
THREE_EIGHTHS = Tableau(
    (0.0, 1 / 3, 2 / 3, 1.0),
    ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
)
"""Kutta's 3/8 rule, of order 4."""


def runge_kutta(
    noise: Float[Tensor, "..."], times: Float[Tensor, " times"], tableau: Tableau
) -> Steps:
    """Integrate dx/dt = v(x, t) along `times`; as many queries a step as the tableau has stages."""
    x = noise
    for t, t_next in pairwise(times.tolist()):
        step = t_next - t
        slopes: list[Tensor] = []
        for node, weights in zip(tableau.nodes, tableau.stages, strict=True):
            slopes.append((yield Query(advance(x, step, weights, slopes), t + node * step)))
        x = advance(x, step, tableau.weights, slopes)
    return x


def advance(
    x: Float[Tensor, "..."],
    step: float,
    weights: tuple[float, ...],
    slopes: list[Float[Tensor, "..."]],
) -> Float[Tensor, "..."]:
    """Move x by a step along the weighted sum of slopes."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + (step * weight) * slope
    return x
