"""Distributions of training times."""

import pytest
import torch

from udiff.diffusion.time import (
    LogitNormalTime,
    Rescaled,
    Restricted,
    TimeDistribution,
    UniformTime,
)
from udiff.system import Rng


def _draw(time: TimeDistribution, num_rows: int, *, rank: int = 0, world_size: int = 1):
    return time.draw(num_rows, Rng(0, rank, world_size).at(3).local)


def test_logit_normal_times_follow_their_density() -> None:
    time = LogitNormalTime(0.5)
    edges = torch.linspace(0, 1, 11)
    found = torch.histc(_draw(time, 100_000), bins=10, min=0, max=1) / 100_000
    grid = torch.linspace(1e-6, 1 - 1e-6, 10_001, dtype=torch.float64)
    cumulative = torch.cumulative_trapezoid(time.density(grid), grid)
    at = cumulative[(edges * 10_000).long().clamp(1, 10_000) - 1]
    assert (found - at.diff()).abs().max() < 0.01


def test_rescaled_times_stay_in_range() -> None:
    t = _draw(Rescaled(UniformTime(), 0.01, 0.99), 10_000)
    assert t.min() >= 0.01
    assert t.max() <= 0.99


@pytest.mark.parametrize("inner", [UniformTime(), LogitNormalTime()])
def test_restricted_times_stay_in_range(inner: TimeDistribution) -> None:
    t = _draw(Restricted(inner, 0.1, 0.3), 1000)
    assert len(t) == 1000
    assert t.min() >= 0.1
    assert t.max() <= 0.3


def test_some_batches_are_restricted_and_others_not() -> None:
    time = Restricted(UniformTime(), 0.0, 0.2, prob=0.5)
    narrow = [time.draw(64, Rng(0).at(step).local).max().item() <= 0.2 for step in range(100)]
    assert 30 < sum(narrow) < 70


@pytest.mark.parametrize(
    "time", [UniformTime(), LogitNormalTime(), Restricted(LogitNormalTime(), 0.1, 0.3, prob=0.5)]
)
def test_ranks_draw_the_rows_of_one_batch(time: TimeDistribution) -> None:
    whole = _draw(time, 12)
    parts = [_draw(time, 4, rank=rank, world_size=3) for rank in range(3)]
    assert torch.equal(torch.stack(parts, 1).flatten(), whole)
