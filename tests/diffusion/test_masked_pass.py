"""Laws of the masked pass: it goes around any objective whose network takes `keep`."""

import torch
from torch import nn

from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.flow_matching import FlowMatching
from udiff.diffusion.masked_pass import (
    FixedMaskRatio,
    MaskedPass,
    UniformMaskRatio,
    num_kept,
)
from udiff.diffusion.objective import Recorded
from udiff.diffusion.path import LinearPath
from udiff.diffusion.time import UniformTime
from udiff.nn.token_mask import is_removed, keep_tokens, kept_tokens, restore_tokens
from udiff.system import Prediction, Rng


class _Asked(nn.Module):
    """Answers 0, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict] = []

    def forward(self, x_t, t, **conditions):
        self.calls.append({"x_t": x_t, "t": t, **conditions})
        return Prediction(torch.zeros_like(x_t))


def _flow(ratio=None) -> MaskedPass:
    flow = FlowMatching(LinearPath(), UniformTime(), LabelDropout(10, 0.5))
    return MaskedPass(flow, ratio or UniformMaskRatio(0.3, 0.2), num_tokens=16, shared=("t",))


def _batch() -> dict[str, torch.Tensor]:
    latent = torch.randn(32, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return {"latent": latent, "label": torch.zeros(32, dtype=torch.long)}


def test_flow_matching_gets_a_masked_pass_too() -> None:
    network, objective, batch = _Asked(), _flow(FixedMaskRatio(0.25)), _batch()
    draws = objective.draw(batch, Rng(0).at(0))
    losses = objective(network, batch, draws)
    masked, plain = network.calls
    assert masked["keep"].shape == (32, 12)
    assert "keep" not in plain
    assert torch.equal(masked["t"], plain["t"])
    assert not torch.equal(masked["label"], plain["label"])
    velocity = [batch["latent"] - draws[name] for name in ("noise", "masked_noise")]
    expected = sum(v.square().mean() for v in velocity)
    torch.testing.assert_close(losses.total, expected)
    assert set(losses.terms) == {"velocity_mse", "masked_velocity_mse"}


def test_a_wrapper_outside_sees_the_plain_prediction() -> None:
    network, objective, batch = _Asked(), _flow(), _batch()
    recorded = Recorded(network)
    objective(recorded, batch, objective.draw(batch, Rng(0).at(0)))
    assert "keep" not in network.calls[-1]


def test_the_ratio_is_the_same_on_all_ranks_and_differs_between_steps() -> None:
    objective, batch = _flow(), _batch()
    ratios = [
        [float(objective.draw(batch, Rng(0, rank, 4).at(step))["mask_ratio"]) for rank in range(4)]
        for step in range(5)
    ]
    assert all(len(set(ranks)) == 1 for ranks in ratios)
    assert len({ranks[0] for ranks in ratios}) == 5


def test_the_number_kept_is_truncated() -> None:
    assert num_kept(256, FixedMaskRatio(0.3).draw(torch.Generator())) == 179
    assert num_kept(256, UniformMaskRatio(0.3, 0.2).at(torch.tensor(0.0))) == 179
    assert num_kept(16, UniformMaskRatio(0.3, 0.2).at(torch.tensor(1.0))) == 8


def test_dropped_tokens_return_to_their_places() -> None:
    tokens = torch.randn(2, 16, 3)
    keep = kept_tokens(torch.rand(2, 16), 9)
    filler = torch.full((2, 16, 3), 7.0)
    restored = restore_tokens(keep_tokens(tokens, keep), keep, filler)
    removed = is_removed(keep, 16)
    assert (removed.sum(1) == 7).all()
    assert torch.equal(restored[~removed], tokens[~removed])
    assert (restored[removed] == 7).all()
