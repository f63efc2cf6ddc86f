"""Gradients scaled to length 1."""

import pytest
import torch

from udiff.diffusion.unit_gradient import UnitGradient
from udiff.models.dual_diffusion.objective import ImageFlow
from udiff.system import Prediction, Rng


@pytest.mark.parametrize("weight", [1, 7])
def test_a_unit_gradient_points_where_the_plain_one_does(weight):
    torch.manual_seed(0)
    plain = ImageFlow(lambda *_: torch.zeros(6, 1, 1), 0.0)
    batch, velocity = {"latent": torch.randn(6, 4, 8, 8)}, torch.randn(6, 4, 8, 8)
    gradients, totals = [], []
    for objective in (plain, UnitGradient(plain)):
        output = velocity.clone().requires_grad_()
        draws = objective.draw(batch, Rng(0).at(0))
        losses = objective(lambda *_, output=output, **__: Prediction(output), batch, draws)
        (weight * losses.total).backward()
        gradients.append(output.grad)
        totals.append(losses.total.detach())
    assert torch.equal(*totals)
    assert gradients[1].norm().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0] / gradients[0].norm(), rtol=1e-4, atol=0)


def test_nothing_is_scaled_where_nothing_learns():
    with torch.no_grad():
        network = lambda *_, **__: Prediction(torch.ones(2, 1, 1, 1))  # noqa: E731
        flow = UnitGradient(ImageFlow(lambda *_: torch.zeros(2, 1, 1), 0.0))
        batch = {"latent": torch.ones(2, 1, 1, 1)}
        assert flow(network, batch, flow.draw(batch, Rng(0).at(0))).total.isfinite()
