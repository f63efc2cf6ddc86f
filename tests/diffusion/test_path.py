"""Paths, and what can be predicted on them."""

import pytest
import torch
from torch import Tensor

from udiff.diffusion.parameterization import DATA, NOISE, SCORE, VELOCITY, Ends, convert
from udiff.diffusion.path import GVPPath, LinearPath, Path, VPPath, per_sample

PATHS = [LinearPath(), GVPPath(), VPPath()]
PREDICTIONS = [VELOCITY, NOISE, DATA, SCORE]
T = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


def _ends() -> Ends:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 7, 3, 4, 4, generator=generator, dtype=torch.float64)
    return Ends(data, noise)


@pytest.mark.parametrize("path", PATHS)
def test_the_dots_are_derivatives(path: Path) -> None:
    t = T.clone().requires_grad_()
    point = path.at(t)

    def slope(value: Tensor) -> Tensor:
        return torch.autograd.grad(value.sum(), t, retain_graph=True)[0]

    for value, dot in [
        (point.alpha, point.alpha_dot),
        (point.sigma, point.sigma_dot),
        (point.alpha.log(), point.log_alpha_dot),
    ]:
        expected = slope(value) if value.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(dot.detach().expand_as(t), expected)


@pytest.mark.parametrize("path", PATHS)
def test_paths_run_from_noise_to_data(path: Path) -> None:
    point = path.at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(point.alpha[1].item(), 1.0)
    assert point.sigma[1].item() == pytest.approx(0, abs=1e-9)
    assert point.alpha[0].item() < 0.01
    assert point.sigma[0].item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_every_prediction_can_be_turned_into_every_other(path: Path, source, target) -> None:
    ends = _ends()
    point = path.at(per_sample(T, ends.data))
    x_t = point.place(ends.data, ends.noise)
    turned = convert(source.target(ends, point), x_t, point, source=source, target=target)
    torch.testing.assert_close(turned, target.target(ends, point))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_has_no_residual(prediction) -> None:
    ends = _ends()
    point = VPPath().at(per_sample(T, ends.data))
    residual = prediction.residual(prediction.target(ends, point), ends, point)
    assert residual.abs().max() < 1e-12
