"""Laws of Adan."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from udiff.settings import AdamWSettings, AdanSettings
from udiff.training.adan import Adan
from udiff.training.optimizer import make_optimizer


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def _weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def test_the_first_step_is_as_long_as_the_learning_rate() -> None:
    module = nn.Linear(3, 2)
    before = _weights(module)
    _step(module, Adan(module.parameters(), lr=0.01), 0)
    torch.testing.assert_close((_weights(module) - before).abs(), torch.full((8,), 0.01))


def test_a_constant_gradient_has_no_difference_to_look_ahead_by() -> None:
    module = nn.Linear(3, 2, bias=False)
    optimizer = Adan(module.parameters(), lr=0.01)
    for _ in range(5):
        _step(module, optimizer, 0)
    assert not optimizer.state[module.weight]["exp_avg_diff"].any()


def test_weight_decay_before_and_after_the_step() -> None:
    for proximal, factor in ((True, 1 / 1.02), (False, 0.98)):
        parameter = nn.Parameter(torch.ones(1))
        parameter.grad = torch.zeros(1)
        Adan([parameter], lr=0.1, weight_decay=0.2, proximal=proximal).step()
        assert parameter.item() == pytest.approx(factor)


def test_parameters_without_gradient_stay() -> None:
    with_gradient, without = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with_gradient.grad = torch.ones(1)
    optimizer = Adan([with_gradient, without], lr=0.1)
    optimizer.step()
    assert without.item() == 1
    assert without not in optimizer.state


def test_a_restored_optimizer_goes_on_as_if_never_stopped() -> None:
    module = nn.Linear(4, 4)
    optimizer = Adan(module.parameters(), lr=0.01, weight_decay=0.1)
    for number in range(3):
        _step(module, optimizer, number)
    twin = copy.deepcopy(module)
    other = Adan(twin.parameters(), lr=0.5)
    state = copy.deepcopy(get_optimizer_state_dict(module, optimizer))
    set_optimizer_state_dict(twin, other, state)
    for number in range(3, 6):
        _step(module, optimizer, number)
        _step(twin, other, number)
    assert torch.equal(_weights(module), _weights(twin))


def test_it_reaches_the_bottom_of_a_bowl() -> None:
    point = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = Adan([point], lr=0.1)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
        optimizer.zero_grad()
        (point.square() * torch.tensor([1.0, 10.0])).sum().backward()
        optimizer.step()
    assert math.isclose(point.norm().item(), 0, abs_tol=0.05)


def test_the_setting_chooses_the_optimizer() -> None:
    module = nn.Linear(2, 2)
    assert isinstance(make_optimizer([module], AdanSettings(name="adan", lr=0.1)), Adan)
    assert isinstance(make_optimizer([module], AdamWSettings(lr=0.1)), torch.optim.AdamW)
