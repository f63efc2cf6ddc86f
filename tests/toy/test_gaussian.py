"""Learned-sigma DDPM reaches its target distribution with every sampler."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.toy.mixture import distance, draw, integrate, predict
from udiff.diffusion import parameterization
from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.gaussian import NoiseSchedule, linear_betas, spaced_timesteps
from udiff.diffusion.gaussian_loss import GaussianObjective, SquaredError, VariationalBound
from udiff.diffusion.gaussian_reverse import (
    DataPrediction,
    FixedLarge,
    FixedSmall,
    LearnedRange,
    NoisePrediction,
    ReverseProcess,
)
from udiff.diffusion.path import Coefficients
from udiff.diffusion.timesteps import UniformTimesteps
from udiff.samplers.ddim import ddim
from udiff.samplers.ddpm import ddpm
from udiff.system import Prediction, Query, Rng, Steps

NUM_POINTS = 2000
SCHEDULE = NoiseSchedule.of(linear_betas(1000))
PREDICTIONS = {
    "noise": (NoisePrediction(), parameterization.NoisePrediction()),
    "data": (DataPrediction(), parameterization.DataPrediction()),
}


def _sampler(name: str, process: ReverseProcess) -> Steps:
    generator = torch.Generator().manual_seed(1)

    def normals():
        while True:
            yield torch.randn(NUM_POINTS, 2, 1, 1, generator=generator)

    draws = normals()
    if name == "ddpm":
        return ddpm(next(draws), process, normals=draws)
    return ddim(next(draws), process, normals=draws, eta={"ddim": 0.0, "ddim_eta": 0.7}[name])


def _distance_to_target(points: Tensor) -> float:
    return distance(points.flatten(1), draw(NUM_POINTS, seed=2))


@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim_eta"])
def test_a_perfect_network_gives_the_target(sampler: str, prediction: str, variance) -> None:
    ours, exact = PREDICTIONS[prediction]
    process = ReverseProcess(SCHEDULE, ours, variance).spaced(spaced_timesteps(1000, "100"))

    def at(t: Tensor) -> Coefficients:
        step, unknown = SCHEDULE.at(int(t), t), torch.tensor(torch.nan)
        return Coefficients(step.alpha.float(), step.sigma.float(), unknown, unknown, unknown)

    def answer(query: Query) -> Tensor:
        path = SimpleNamespace(at=at)
        flat = predict(query.x.flatten(1), query.t, path=path, prediction=exact)
        return flat[:, :, None, None]

    points = integrate(_sampler(sampler, process), answer)
    assert _distance_to_target(points) < 0.1


class _PlaneNetwork(nn.Module):
    """Noise and variance of points (batch, 2, 1, 1), as pictures of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 4)
        )

    def forward(self, x_t: Tensor, timestep: Tensor, *, label: Tensor) -> Prediction:
        t = timestep.float() / 1000
        waves = [f(k * torch.pi * t) for k in (0.5, 1.0) for f in (torch.sin, torch.cos)]
        features = torch.cat([x_t.flatten(1), torch.stack([t, *waves], -1)], -1)
        return Prediction(self.layers(features)[:, :, None, None])


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, ReverseProcess]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network, process = _PlaneNetwork(), ReverseProcess(SCHEDULE, NoisePrediction(), LearnedRange())
    terms = {"mse": SquaredError(5.0), "vb": VariationalBound()}
    objective = GaussianObjective(process, UniformTimesteps(1000), LabelDropout(1, 0.0), terms)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    rng, num_steps = Rng(0), 1000
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / num_steps)
        label = torch.zeros(512, dtype=torch.long)
        batch = {"latent": draw(512, seed=100 + step)[:, :, None, None], "label": label}
        optimizer.zero_grad()
        objective(network, batch, objective.draw(batch, rng.at(step))).total.backward()
        optimizer.step()
    return network, process


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim_eta"])
def test_a_trained_network_gives_the_target(
    trained: tuple[nn.Module, ReverseProcess], sampler: str
) -> None:
    network, process = trained
    label = torch.zeros(NUM_POINTS, dtype=torch.long)

    def answer(query: Query) -> Tensor:
        timestep = torch.full((NUM_POINTS,), query.t)
        return network(query.x, timestep, label=label).output

    with torch.inference_mode():
        spaced = process.spaced(spaced_timesteps(1000, "50"))
        points = integrate(_sampler(sampler, spaced), answer)
    assert _distance_to_target(points) < 0.15
