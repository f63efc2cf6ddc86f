"""The adaptive method against torchdiffeq, whose control it follows."""

import math

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from tests.toy.mixture import integrate
from udiff.samplers.dopri5 import Tolerance, dopri5
from udiff.system import Query

START = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def _velocity(t: float | Tensor, x: Tensor) -> Tensor:
    return x * torch.cos(6 * torch.as_tensor(t, dtype=torch.float64)) + torch.stack(
        [x[1], -x[0], x[2] * 0.1]
    )


def _jumping(t: float | Tensor, x: Tensor) -> Tensor:
    return _velocity(t, x) + (4.0 if float(t) >= 0.3 else 0.0)


def _ours(velocity, stops: tuple[float, ...], tolerance: Tolerance) -> tuple[Tensor, list[Query]]:
    queries: list[Query] = []

    def answer(query: Query) -> Tensor:
        queries.append(query)
        return velocity(query.t, query.x)

    return integrate(dopri5(START, stops, tolerance=tolerance), answer), queries


@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_takes_the_steps_of_torchdiffeq(rtol: float) -> None:
    theirs = []

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        theirs.append(t.item())
        return _velocity(t, x)

    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    # torchdiffeq steps beyond the end and interpolates, unless it is told to step there.
    options = {"step_t": ends[1:]}
    expected = odeint(velocity, START, ends, rtol=rtol, atol=1e-6, method="dopri5", options=options)
    result, queries = _ours(_velocity, (0.0, 1.0), Tolerance(1e-6, rtol))
    torch.testing.assert_close(result, expected[-1], rtol=1e-12, atol=1e-12)
    assert [query.t for query in queries] == pytest.approx(theirs[: len(queries)], abs=1e-9)


def test_a_jump_of_the_velocity_costs_no_accuracy() -> None:
    exact, _ = _ours(_jumping, (0.0, 0.3, 1.0), Tolerance(1e-12, 1e-12))
    known, queries = _ours(_jumping, (0.0, 0.3, 1.0), Tolerance(1e-6, 1e-4))
    unknown, more = _ours(_jumping, (0.0, 1.0), Tolerance(1e-6, 1e-4))
    assert (known - exact).abs().max() < 0.2 * (unknown - exact).abs().max()
    assert len(queries) < len(more)


def test_queries_stay_inside_and_before_the_jump() -> None:
    _, queries = _ours(_jumping, (0.0, 0.3, 1.0), Tolerance(1e-6, 1e-4))
    assert all(0 <= query.t < 1 for query in queries)
    assert math.nextafter(0.3, 0) in [query.t for query in queries]


def test_an_infinite_velocity_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match="not finite at t = 0"):
        _ours(lambda t, x: x * math.inf, (0.0, 1.0), Tolerance(1e-6, 1e-3))
