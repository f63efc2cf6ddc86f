"""Every path x prediction x sampler reaches its target distribution, as do trained networks."""

import pytest
import torch
from torch import Tensor, nn

from tests.toy.mixture import distance, draw, integrate, predict
from udiff.diffusion.conditions import LabelDropout
from udiff.models.lightningdit.settings import ObjectiveSettings, TransportSampling
from udiff.models.lightningdit.transport import Transport, make_flow_matching, make_sampler
from udiff.system import Prediction, Rng

NUM_POINTS = 2000
PATHS = ("linear", "gvp", "vp")
PREDICTIONS = ("velocity", "noise", "data", "score")
METHODS = ("euler", "heun", "midpoint", "heun3", "rk4", "dopri5", "sde_euler", "sde_heun")


def _points(sampling: TransportSampling, transport: Transport, num_steps: int, answer) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def normals():
        while True:
            yield torch.randn(NUM_POINTS, 2, generator=generator)

    draws = normals()
    steps = make_sampler(sampling, transport, next(draws), num_steps=num_steps, normals=draws)
    with torch.inference_mode():
        return integrate(steps, answer)


def _exact(transport: Transport):
    path, prediction = transport.path, transport.prediction
    return lambda query: predict(query.x, query.t, path=path, prediction=prediction)


def test_samples_of_one_distribution_are_near() -> None:
    assert distance(draw(NUM_POINTS, seed=2), draw(NUM_POINTS, seed=3)) < 0.06


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_a_perfect_network_gives_the_target(path: str, prediction: str, method: str) -> None:
    transport = Transport.make(ObjectiveSettings(path=path, prediction=prediction))
    points = _points(TransportSampling(method=method), transport, 80, _exact(transport))
    assert distance(points, draw(NUM_POINTS, seed=2)) < 0.1


@pytest.mark.parametrize("last", ["mean", "ode", "tweedie", "none"])
@pytest.mark.parametrize(
    "diffusion", ["path", "sigma", "linear", "decreasing", "middle", "constant"]
)
def test_every_diffusion_and_last_step_gives_the_target(diffusion: str, last: str) -> None:
    transport = Transport.make(ObjectiveSettings())
    sampling = TransportSampling(method="sde_heun", diffusion=diffusion, last=last)
    points = _points(sampling, transport, 150, _exact(transport))
    assert distance(points, draw(NUM_POINTS, seed=2)) < 0.12


class _PlaneNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2)
        )

    def forward(self, x_t: Tensor, t: Tensor, *, label: Tensor) -> Prediction:
        waves = [f(k * torch.pi * t) for k in (0.5, 1.0) for f in (torch.sin, torch.cos)]
        return Prediction(self.layers(torch.cat([x_t, torch.stack([t, *waves], -1)], -1)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_a_trained_network_comes_near_the_target(path: str, prediction: str) -> None:
    settings = ObjectiveSettings(path=path, prediction=prediction, direction=None, time="uniform")
    transport = Transport.make(settings, sample_eps=0.02)
    objective = make_flow_matching(settings, transport, LabelDropout(1, 0.1))
    torch.manual_seed(0)
    network = _PlaneNetwork()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    data, rng = draw(20_000, seed=4), Rng(0)
    for step in range(400):
        latent = data[torch.randint(len(data), (256,))]
        batch = {"latent": latent, "label": torch.zeros(256, dtype=torch.long)}
        losses = objective(network, batch, objective.draw(batch, rng.at(step)))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 400)
        optimizer.step()
    label = torch.zeros(NUM_POINTS)
    points = _points(
        TransportSampling(method="heun"),
        transport,
        30,
        lambda query: network(query.x, torch.full((NUM_POINTS,), query.t), label=label).output,
    )
    assert distance(points, draw(NUM_POINTS, seed=2)) < 0.25
