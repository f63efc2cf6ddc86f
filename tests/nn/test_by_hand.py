"""Gradients written by hand are those of the formulas that compilers and GPUs get."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from udiff.nn.heads import RotaryHeads, rotary_heads, split_heads
from udiff.nn.norm import AffineRMS, ModulatedRMSNorm, RMSNorm, modulate
from udiff.nn.rotary import RotaryTable, rotary_table, rotate


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


def _positions(*, per_sample: bool) -> RotaryTable:
    table = rotary_table((2, 3), 8, extent=3.0, device=torch.device("cpu"))
    table = RotaryTable(table.cos.double(), table.sin.double())
    if per_sample:
        return table.keep(torch.tensor([[4, 0, 5, 1], [1, 2, 3, 0]]))
    return table


@pytest.mark.parametrize("tokens", [1, 5], ids=["of a sample", "of each token"])
@pytest.mark.parametrize("shifted", [True, False])
def test_gradient_of_a_modulated_norm(tokens: int, shifted: bool):
    torch.manual_seed(0)
    shift = _normal(2, tokens, 8) if shifted else None
    assert gradcheck(AffineRMS.apply, (_normal(2, 5, 8), _normal(2, tokens, 8), shift, 1e-6))


@pytest.mark.parametrize("tokens", [1, 5], ids=["of a sample", "of each token"])
@pytest.mark.parametrize("shifted", [True, False])
def test_a_modulated_norm_is_a_norm_and_a_modulation(tokens: int, shifted: bool):
    torch.manual_seed(0)
    norm = ModulatedRMSNorm(8)
    nn.init.normal_(norm.weight)
    x, scale = torch.randn(2, 5, 8), torch.randn(2, tokens, 8)
    shift = torch.randn(2, tokens, 8) if shifted else None
    assert_close(norm(x, scale, shift), modulate(RMSNorm.forward(norm, x), scale, shift))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_gradient_of_turned_heads(per_sample: bool, normalized: bool):
    torch.manual_seed(0)
    positions = _positions(per_sample=per_sample)
    qkv, weight = _normal(2, len(positions.cos[0]) if per_sample else 6, 3, 2, 8), None
    if normalized:
        weight = _normal(2, 1, 8)
    assert gradcheck(lambda x, w: RotaryHeads.apply(x, w, positions, 1e-6), (qkv, weight))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_turned_heads_are_heads_normalized_and_turned(per_sample: bool, normalized: bool):
    torch.manual_seed(0)
    positions = _positions(per_sample=per_sample)
    positions = RotaryTable(positions.cos.float(), positions.sin.float())
    norms = RMSNorm(8), RMSNorm(8)
    nn.init.normal_(norms[0].weight)
    q_norm, k_norm = norms if normalized else (nn.Identity(), nn.Identity())
    qkv = torch.randn(2, positions.cos.shape[-2], 48)
    found = rotary_heads(qkv, 2, positions=positions, q_norm=q_norm, k_norm=k_norm)
    q, k, v = split_heads(qkv, 2)
    assert_close(found.q, rotate(q_norm(q), positions))
    assert_close(found.k, rotate(k_norm(k), positions))
    assert_close(found.v, v)
