"""Stochastic samplers."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.toy.mixture import integrate, predict
from udiff.diffusion.parameterization import VELOCITY
from udiff.diffusion.path import LinearPath
from udiff.samplers import sde
from udiff.samplers.euler import euler
from udiff.samplers.heun import heun
from udiff.samplers.times import time_grid
from udiff.system import Query

PATH = LinearPath()
NOISE = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))


def _velocity(query: Query) -> Tensor:
    return predict(query.x, query.t, path=PATH, prediction=VELOCITY)


def _normals() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(50, 2, generator=generator)


def _reverse(norm: float) -> sde.Reverse:
    return sde.Reverse(PATH, partial(sde.sigma_diffusion, norm=norm))


@pytest.mark.parametrize(
    ("method", "ode"), [(sde.euler_maruyama, euler), (sde.stochastic_heun, heun)]
)
def test_without_diffusion_it_is_the_ode(method, ode) -> None:
    times = time_grid(10)[:-1]
    stochastic = integrate(
        method(NOISE, times, reverse=_reverse(0.0), normals=_normals()), _velocity
    )
    torch.testing.assert_close(stochastic, integrate(ode(NOISE, times), _velocity))


def test_equal_normals_give_equal_samples() -> None:
    ends = [
        integrate(
            sde.euler_maruyama(NOISE, time_grid(10), reverse=_reverse(1.0), normals=_normals()),
            _velocity,
        )
        for _ in range(2)
    ]
    assert torch.equal(*ends)


def test_tweedie_step_is_the_data_prediction() -> None:
    t, x = 0.9, NOISE
    velocity = _velocity(Query(x, t))
    data = sde.tweedie_step(x, velocity, t, reverse=_reverse(1.0))
    torch.testing.assert_close(data, x + (1 - t) * velocity)


def test_finish_asks_once_more() -> None:
    times, asked = time_grid(4, last_step=0.04)[:-1], []

    def answer(query: Query) -> Tensor:
        asked.append(query.t)
        return _velocity(query)

    integrate(sde.finish(euler(NOISE, times), 0.96, sde.ode_step), answer)
    assert asked == pytest.approx([*times[:-1].tolist(), 0.96])
