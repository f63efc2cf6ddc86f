"""Driving samplings side by side."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from udiff.samplers.euler import euler
from udiff.samplers.reuse import reuse_encoder
from udiff.samplers.ticks import drive, finish, start
from udiff.samplers.times import time_grid
from udiff.system import Guidance, Prediction, Sampling


class Labels(nn.Module):
    """Answers with the label; counts rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Prediction:
        self.rows.append(len(x))
        return Prediction(label.float().view(-1, 1, 1, 1).expand_as(x))


def _sampling(guidance: Guidance, *, num_steps: int = 4) -> Sampling:
    steps = euler(torch.zeros(6, 1, 1), time_grid(num_steps))
    return Sampling(steps, {"label": torch.tensor(3)}, {"label": torch.tensor(1)}, guidance)


def test_null_rows_are_computed_where_guidance_is_on():
    network = Labels()
    drive(network, [_sampling(Guidance(2.0, (0.4, 0.6))), _sampling(Guidance())])
    assert network.rows == [2, 2, 3, 2]


def test_guided_channels_are_those_between_the_two_numbers():
    guidance = Guidance(3.0, channels=4, first_channel=2, other_scale=1.5)
    sample = drive(Labels(), [_sampling(guidance)])[0].flatten()
    torch.testing.assert_close(sample, torch.tensor([4.0, 4.0, 7.0, 7.0, 4.0, 4.0]))


def test_other_channels_are_guided_outside_the_interval_too():
    guidance = Guidance(3.0, (0.9, 1.0), channels=4, other_scale=1.5)
    sample = drive(Labels(), [_sampling(guidance)])[0].flatten()
    torch.testing.assert_close(sample, torch.tensor([3.0, 3.0, 3.0, 3.0, 4.0, 4.0]))


def test_results_keep_the_order_of_their_samplings():
    network = Labels()
    drive(network, [_sampling(Guidance(), num_steps=n) for n in (3, 1, 2)])
    assert network.rows == [3, 2, 1]


def test_rows_of_a_query_are_known_before_its_tick():
    guided = _sampling(Guidance(2.0, (0.4, 0.6)))
    assert start(Labels(), guided).num_rows == 1
    kept = _sampling(Guidance(2.0, (0.4, 0.6)))
    steps = reuse_encoder(kept.steps, {0})
    assert start(Labels(), replace(kept, steps=steps)).num_rows == 2


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=6))
def test_samplings_of_other_shapes_and_networks_run_side_by_side(kinds):
    networks = {number: Labels() for number in (1, 2, 3)}
    running = []
    for size, number in kinds:
        sampling = _sampling(Guidance())
        steps = euler(torch.zeros(size, 1, 1), time_grid(4))
        running.append(start(networks[number], replace(sampling, steps=steps)))
    finish(running)
    assert [len(r.result) for r in running] == [size for size, _ in kinds]
    assert all(torch.allclose(r.result, torch.tensor(3.0)) for r in running)
    for number, network in networks.items():  # one call a tick for each shape
        assert len(network.rows) == 4 * len({kind for kind in kinds if kind[1] == number})
