"""Times and masks of masked text diffusion."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udiff.diffusion.masked_text import (
    ImportanceTimes,
    MaskTimes,
    after_end,
    by_importance,
    mask_chance,
)
from udiff.system import Rng


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32))
def test_antithetic_times_lie_one_in_each_part(num_rows, seed):
    uniform = torch.rand(num_rows, generator=torch.Generator().manual_seed(seed))
    times = MaskTimes().at(uniform, torch.arange(num_rows), num_rows)
    parts = ((times - 1e-3) / (1 - 1e-3) * num_rows + 1e-4).long().clamp(max=num_rows - 1)
    assert torch.equal(parts.sort().values, torch.arange(num_rows))
    assert (times >= 1e-3).all()


def test_ranks_agree_on_the_parts():
    whole = MaskTimes().draw(8, Rng(3).at(5).local)
    halves = [MaskTimes().draw(4, Rng(3, rank, 2).at(5).local) for rank in range(2)]
    torch.testing.assert_close(torch.stack(halves, 1).flatten(), whole)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_importance_makes_the_chance_of_the_mask_geometric(one, other):
    t = torch.tensor([one, other, (one + other) / 2], dtype=torch.float64)
    first, second, middle = mask_chance(by_importance(t))
    torch.testing.assert_close(middle, (first * second).sqrt())
    drawn = ImportanceTimes().draw(8, Rng(1).at(0).local)
    assert torch.equal(drawn, by_importance(MaskTimes().draw(8, Rng(1).at(0).local)))
    ends = mask_chance(by_importance(torch.tensor([0.0, 1.0])))
    torch.testing.assert_close(ends, torch.tensor([1e-3, 0.999]), rtol=1e-3, atol=0)


def test_what_follows_the_first_end_token_is_padding():
    ids = torch.tensor([[5, 1, 1, 7], [5, 6, 7, 8], [1, 1, 1, 1]])
    assert after_end(ids, 1).int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]
