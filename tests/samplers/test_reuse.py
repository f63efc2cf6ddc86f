"""Reuse of encoder states between steps."""

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from udiff.samplers.euler import euler
from udiff.samplers.reuse import (
    RefreshPlan,
    choose_refresh_steps,
    reuse_encoder,
    state_similarity,
)
from udiff.samplers.ticks import drive
from udiff.samplers.times import time_grid
from udiff.settings import ReuseSettings
from udiff.system import Guidance, Prediction, Sampling


class Recorder(nn.Module):
    """A network whose state is the time and label that its encoder last saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.fresh: list[tuple[float, int]] = []
        self.num_calls = 0

    def forward(
        self, x: Tensor, t: Tensor, *, label: Tensor, state: Tensor | None = None
    ) -> Prediction:
        self.num_calls += 1
        if state is None:
            self.fresh += list(zip(t.tolist(), label.tolist(), strict=True))
            state = torch.stack([torch.cos(3 * t), torch.sin(3 * t) + label], -1)[:, None]
        return Prediction(
            self.weight * state.mean((1, 2))[:, None] * torch.ones_like(x), state=state
        )


def _sampling(steps, *, scale: float = 1.0, interval=None) -> Sampling:
    null = {"label": torch.tensor(9)}
    return Sampling(steps, {"label": torch.tensor(1)}, null, Guidance(scale, interval))


def test_the_encoder_runs_at_the_chosen_steps_alone():
    network, times = Recorder(), time_grid(8)
    drive(network, [_sampling(reuse_encoder(euler(torch.zeros(2), times), {0, 3, 6}))])
    assert [t for t, _ in network.fresh] == pytest.approx([0, 3 / 8, 6 / 8])


def test_refreshing_at_every_step_changes_nothing():
    noise, times = torch.randn(2), time_grid(8)
    guided = {"scale": 2.0, "interval": (0.3, 1.0)}
    plain, reused = (
        drive(Recorder(), [_sampling(steps, **guided)])[0]
        for steps in (euler(noise, times), reuse_encoder(euler(noise, times), range(8)))
    )
    assert torch.equal(plain, reused)


def test_a_refresh_outside_the_interval_finds_the_null_state_too():
    network = Recorder()
    steps = reuse_encoder(euler(torch.zeros(2), time_grid(8)), {0})
    drive(network, [_sampling(steps, scale=2.0, interval=(0.5, 1.0))])
    assert network.fresh == [(0, 1), (0, 9)]


def test_requests_with_and_without_reuse_share_ticks():
    noise, times = torch.randn(2), time_grid(6)

    def begin(kind: str) -> Sampling:
        steps = euler(noise, times)
        return _sampling(reuse_encoder(steps, {0, 4}) if kind == "reused" else steps, scale=3.0)

    alone = [drive(Recorder(), [begin(kind)])[0] for kind in ("reused", "plain")]
    network = Recorder()
    together = drive(network, [begin("reused"), begin("plain")])
    torch.testing.assert_close(torch.stack(together), torch.stack(alone))
    assert network.num_calls == 6 + 4  # a second call where one reuses and one does not


def test_a_network_without_state_is_named():
    class Plain(nn.Module):
        def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Prediction:
            return Prediction(x)

    with pytest.raises(ValueError, match="no encoder whose state could be reused"):
        drive(Plain(), [_sampling(reuse_encoder(euler(torch.zeros(2), time_grid(2)), {0}))])


@pytest.mark.parametrize("num_refreshes", [1, 2, 3, 5, 8])
def test_the_dynamic_program_finds_what_trying_all_finds(num_refreshes):
    states = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(2)).cumsum(0)
    similarity = state_similarity(states)

    def loss(steps: tuple[int, ...]) -> float:
        last = [max(s for s in steps if s <= step) for step in range(8)]
        return sum(1 - similarity[step, used].item() for step, used in enumerate(last))

    tried = min(loss((0, *rest)) for rest in combinations(range(1, 8), num_refreshes - 1))
    found = choose_refresh_steps(similarity, num_refreshes)
    assert len(found) == num_refreshes
    assert loss(found) == pytest.approx(tried, abs=1e-6)


def test_a_search_is_kept_for_equal_requests_and_weights_only():
    network = Recorder()
    plan = RefreshPlan(network, ReuseSettings(every=2, choice="dynamic"))
    searches = []

    def begin(number: int, seed: int) -> Sampling:
        searches.append(seed)
        return _sampling(euler(torch.full((2,), float(seed)), time_grid(6)))

    def num_searches(key: str) -> int:
        searches.clear()
        plan.apply(begin(0, 0), key=key, begin=begin)
        return len(searches) // 8

    assert [num_searches(key) for key in "aab"] == [1, 0, 1]
    with torch.no_grad():
        network.weight.add_(1)
    assert num_searches("a") == 1


def test_more_steps_per_refresh_than_steps_leave_one():
    plan = RefreshPlan(Recorder(), ReuseSettings(every=50, choice="dynamic"))
    network = plan._network
    sampling = plan.apply(
        _sampling(euler(torch.zeros(2), time_grid(4))),
        key=0,
        begin=lambda number, seed: _sampling(euler(torch.zeros(2), time_grid(4))),
    )
    network.fresh.clear()
    drive(network, [sampling])
    assert [t for t, _ in network.fresh] == [0]
