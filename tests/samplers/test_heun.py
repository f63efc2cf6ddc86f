"""Heun's method, and the other fixed-step Runge-Kutta methods."""

import math

import pytest
import torch
from torch import Tensor

from tests.toy.mixture import integrate
from udiff.samplers.heun import heun
from udiff.samplers.runge_kutta import HEUN3, MIDPOINT, THREE_EIGHTHS, runge_kutta
from udiff.system import Query, Steps

METHODS = {
    "heun": heun,
    "midpoint": lambda x, times: runge_kutta(x, times, MIDPOINT),
    "heun3": lambda x, times: runge_kutta(x, times, HEUN3),
    "rk4": lambda x, times: runge_kutta(x, times, THREE_EIGHTHS),
}


def _end(method: str, num_steps: int) -> tuple[Tensor, list[Query]]:
    """Integrate dx/dt = x cos(4 t) from x(0) = 1."""
    queries: list[Query] = []

    def answer(query: Query) -> Tensor:
        queries.append(query)
        return query.x * math.cos(4 * query.t)

    times = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    steps: Steps = METHODS[method](torch.ones(3, dtype=torch.float64), times)
    return integrate(steps, answer), queries


@pytest.mark.parametrize(
    ("method", "order"), [("heun", 2), ("midpoint", 2), ("heun3", 3), ("rk4", 4)]
)
def test_error_falls_with_the_order(method: str, order: int) -> None:
    exact = math.exp(math.sin(4) / 4)
    coarse, fine = (abs(_end(method, n)[0][0].item() - exact) for n in (40, 80))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize(
    ("method", "stages"), [("heun", 2), ("midpoint", 2), ("heun3", 3), ("rk4", 4)]
)
def test_queries_stay_inside_the_interval(method: str, stages: int) -> None:
    _, queries = _end(method, 5)
    assert len(queries) == 5 * stages
    assert all(0 <= query.t <= 1 for query in queries)


def test_closing_a_sampler_ends_it() -> None:
    steps = heun(torch.ones(1), torch.linspace(0, 1, 5))
    next(steps)
    steps.close()
    with pytest.raises(StopIteration):
        next(steps)
