"""Flow matching, and losses wrapped around it."""

import pytest
import torch
from torch import Tensor

from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.direction import VelocityDirection
from udiff.diffusion.flow_matching import FlowMatching, velocity_weight
from udiff.diffusion.parameterization import NOISE, SCORE, VELOCITY, Ends
from udiff.diffusion.path import GVPPath, LinearPath, per_sample
from udiff.diffusion.time import UniformTime
from udiff.system import Prediction, Rng

BATCH = {"latent": torch.randn(6, 3, 4, 4), "label": torch.zeros(6, dtype=torch.long)}
FLOW_MATCHING = FlowMatching(LinearPath(), UniformTime(), LabelDropout(10, 0.5))


class _Scaled:
    """A network that answers the true velocity times a factor, and counts its calls."""

    def __init__(self, draws: dict[str, Tensor], factor: float) -> None:
        self.velocity = BATCH["latent"] - draws["noise"]
        self.factor = factor
        self.num_calls = 0

    def __call__(self, x_t: Tensor, t: Tensor, *, label: Tensor) -> Prediction:
        self.num_calls += 1
        return Prediction(self.factor * self.velocity)


def test_a_perfect_network_has_no_loss() -> None:
    objective = VelocityDirection(FLOW_MATCHING, LinearPath())
    draws = objective.draw(BATCH, Rng(0).at(0))
    losses = objective(_Scaled(draws, 1.0), BATCH, draws)
    assert losses.total.item() == pytest.approx(0, abs=1e-6)


def test_direction_sees_no_length() -> None:
    draws = FLOW_MATCHING.draw(BATCH, Rng(0).at(0))
    objective = VelocityDirection(FLOW_MATCHING, LinearPath(), weight=0.5)
    right, wrong = (objective(_Scaled(draws, f), BATCH, draws).terms for f in (3.0, -1.0))
    assert right["velocity_direction"].item() == pytest.approx(0, abs=1e-6)
    assert wrong["velocity_direction"].item() == pytest.approx(2, abs=1e-6)


def test_wrappers_nest_and_the_network_runs_once() -> None:
    draws = FLOW_MATCHING.draw(BATCH, Rng(0).at(0))
    network = _Scaled(draws, -1.0)
    inner = VelocityDirection(FLOW_MATCHING, LinearPath(), weight=0.25)
    losses = VelocityDirection(inner, LinearPath(), weight=0.5)(network, BATCH, draws)
    assert network.num_calls == 1
    assert losses.total.item() == pytest.approx(losses.terms["velocity_mse"].item() + 2 * 0.75)


def test_direction_follows_from_any_prediction() -> None:
    draws, path = FLOW_MATCHING.draw(BATCH, Rng(0).at(0)), GVPPath()
    draws["t"] = draws["t"].clamp(0.05, 0.95)
    point = path.at(per_sample(draws["t"], BATCH["latent"]))
    for prediction in (VELOCITY, NOISE, SCORE):
        answer = prediction.target(Ends(BATCH["latent"], draws["noise"]), point)
        flow_matching = FlowMatching(path, UniformTime(), LabelDropout(10, 0.5), prediction)
        objective = VelocityDirection(flow_matching, path, prediction)
        losses = objective(lambda *_, label, out=answer: Prediction(out), BATCH, draws)
        assert losses.total.item() == pytest.approx(0, abs=1e-4)


def test_weights_multiply_the_squared_error() -> None:
    draws = FLOW_MATCHING.draw(BATCH, Rng(0).at(0))
    draws["t"] = torch.full((6,), 0.5)
    weighted = FlowMatching(
        LinearPath(), UniformTime(), LabelDropout(10, 0.5), NOISE, weight=velocity_weight
    )
    plain = FlowMatching(LinearPath(), UniformTime(), LabelDropout(10, 0.5), NOISE)
    network = _Scaled(draws, 1.0)
    # V / sigma of the straight path is 1 / t.
    ratio = weighted(network, BATCH, draws).total / plain(network, BATCH, draws).total
    assert ratio.item() == pytest.approx(4.0)


def test_a_label_is_dropped_where_its_draw_says_so() -> None:
    dropped = LabelDropout(10, 0.3).drop(torch.tensor([1, 2, 3]), torch.tensor([0.1, 0.3, 0.9]))
    assert dropped.tolist() == [10, 2, 3]
