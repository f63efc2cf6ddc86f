"""Adams' multistep methods."""

import pytest
import torch

from tests.toy.mixture import integrate
from udiff.samplers.adams import adams, adams_coefficients, log_snr
from udiff.samplers.euler import euler
from udiff.samplers.times import time_grid


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_sum_to_one(order):
    for row in adams_coefficients(time_grid(9, last_step=0.04, shift=2.0), order=order):
        assert sum(row) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("order", "weights"),
    [
        (2, [-1 / 2, 3 / 2]),
        (3, [5 / 12, -16 / 12, 23 / 12]),
        (4, [-9 / 24, 37 / 24, -59 / 24, 55 / 24]),
    ],
)
def test_equal_steps_have_the_textbook_weights(order, weights):
    rows = adams_coefficients(torch.linspace(0, 1, 9, dtype=torch.float64).float(), order=order)
    assert rows[-1] == pytest.approx(weights, abs=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_once_started_it_is_exact_on_polynomials_below_its_order(order):
    power = order - 1
    times = torch.cat([torch.zeros(1), torch.linspace(0.1, 1, 12) ** 1.3]).double()

    def weigh(row: list[float], nodes: torch.Tensor) -> float:
        return sum(w * t**power for w, t in zip(row, nodes.tolist(), strict=True))

    rows = adams_coefficients(times.float(), order=order)
    for index in range(order - 1, len(rows)):
        start, end = times[index].float().item(), times[index + 1].float().item()
        mean = (end ** (power + 1) - start ** (power + 1)) / (power + 1) / (end - start)
        nodes = times[index + 1 - order : index + 1].float().double()
        assert weigh(rows[index], nodes) == pytest.approx(mean, abs=1e-9)


def test_order_one_is_euler():
    noise, times = torch.randn(4, 3), time_grid(7, last_step=0.04)

    def velocity(query):
        return (query.t + 1) * query.x.cos()

    torch.testing.assert_close(
        integrate(adams(noise, times, order=1, clock=log_snr), velocity),
        integrate(euler(noise, times), velocity),
    )


def test_higher_orders_come_closer():
    noise, exact = torch.ones(1, dtype=torch.float64), torch.e
    errors = [
        abs(integrate(adams(noise, time_grid(20), order=order), lambda q: q.x).item() - exact)
        for order in (1, 2, 3, 4)
    ]
    assert errors[0] > 5 * errors[1]
    assert errors[1] > errors[2]


def test_an_order_that_there_is_not_is_named():
    with pytest.raises(ValueError, match=r"sampling.order must be in 1..4, got 5"):
        adams_coefficients(time_grid(4), order=5)
