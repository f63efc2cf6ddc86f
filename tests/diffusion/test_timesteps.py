"""Laws of drawing timesteps."""

import pytest
import torch
from torch import nn

from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.gaussian import NoiseSchedule, cosine_betas
from udiff.diffusion.gaussian_loss import GaussianObjective, SquaredError
from udiff.diffusion.gaussian_reverse import FixedLarge, NoisePrediction, ReverseProcess
from udiff.diffusion.timesteps import ImportanceSampled, LossSecondMoment, UniformTimesteps
from udiff.system import Prediction, Rng


def _warm(losses: list[float], *, history: int = 2) -> LossSecondMoment:
    sampler = LossSecondMoment(len(losses), history=history)
    for _ in range(history):
        sampler.record(torch.arange(len(losses)), torch.tensor(losses))
    return sampler


def test_uniform_timesteps_cover_the_schedule_evenly() -> None:
    timesteps = UniformTimesteps(10).draw(20_000, Rng(0).at(0).local)
    counts = timesteps.bincount(minlength=10)
    assert counts.min() > 1850
    assert counts.max() < 2150


def test_all_timesteps_are_alike_until_each_has_its_history() -> None:
    sampler = LossSecondMoment(3, history=2)
    sampler.record(torch.tensor([0, 0, 0, 1, 1, 2]), torch.ones(6))
    assert sampler.weights().tolist() == [1, 1, 1]
    sampler.record(torch.tensor([2]), torch.tensor([5.0]))
    assert sampler.weights()[2] > sampler.weights()[0]


def test_the_oldest_loss_gives_way() -> None:
    sampler = _warm([1.0, 1.0])
    sampler.record(torch.tensor([1, 1]), torch.tensor([3.0, 3.0]))
    weights = sampler.weights()
    assert weights[1] / weights[0] == pytest.approx(3, rel=0.01)


def test_timesteps_are_drawn_in_proportion_to_their_weights() -> None:
    sampler = _warm([1.0, 2.0, 5.0])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = sampler.choose(uniform).bincount(minlength=3) / len(uniform)
    expected = (sampler.weights() / sampler.weights().sum()).float()
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)


def test_importance_weights_average_to_1() -> None:
    sampler = _warm([1.0, 2.0, 5.0])
    p = sampler.weights() / sampler.weights().sum()
    assert float((p * sampler.importance()).sum()) == pytest.approx(1)


def test_a_checkpoint_holds_the_history() -> None:
    sampler, fresh = _warm([1.0, 4.0]), LossSecondMoment(2, history=2)
    fresh.load_state_dict(sampler.state_dict())
    assert torch.equal(fresh.weights(), sampler.weights())


class _Zero(nn.Module):
    def forward(self, x_t, timestep, *, label):
        return Prediction(torch.zeros_like(x_t))


def test_an_objective_learns_which_timesteps_are_hard_and_stays_unbiased() -> None:
    process = ReverseProcess(NoiseSchedule.of(cosine_betas(4)), NoisePrediction(), FixedLarge())
    plain = GaussianObjective(
        process, UniformTimesteps(4), LabelDropout(1, 0.0), {"mse": SquaredError(0.1)}
    )
    sampler = LossSecondMoment(4, history=3)
    objective = ImportanceSampled(plain, sampler)
    batch = {"latent": torch.zeros(64, 2, 2, 2), "label": torch.zeros(64, dtype=torch.long)}
    totals = []
    for step in range(60):
        draws = objective.draw(batch, Rng(0).at(step))
        totals.append(objective(_Zero(), batch, draws).total)
    assert (sampler.num_losses >= 3).all()
    at = process.schedule.at(torch.arange(4), batch["latent"])
    snr = (at.alpha / at.sigma).square().flatten()
    expected = (snr.clamp_max(0.1) / snr).mean()
    assert torch.stack(totals[10:]).mean() == pytest.approx(float(expected), rel=0.05)
    assert sampler.weights().argmin() == snr.argmax()
