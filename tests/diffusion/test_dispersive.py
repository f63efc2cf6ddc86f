"""The dispersive loss."""

import multiprocessing as mp
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from udiff.diffusion.dispersive import _of_all_ranks, dispersive_loss


def _features() -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def test_it_falls_when_samples_move_apart():
    close = torch.ones(4, 5) + 0.01 * _features()[:4]
    loss = dispersive_loss(_features()[:4], temperature=1.0)
    assert loss < dispersive_loss(close, temperature=1.0)
    assert dispersive_loss(close, temperature=1.0).item() == pytest.approx(0, abs=1e-2)


def test_following_its_gradient_spreads_samples():
    features = (torch.ones(6, 5) + 0.1 * _features()).requires_grad_()
    loss = dispersive_loss(features, temperature=1.0)
    loss.backward()
    assert features.grad.abs().max() > 1e-4
    assert dispersive_loss(features - features.grad, temperature=1.0) < loss


def test_one_sample_has_nobody_to_keep_away_from():
    with pytest.raises(ValueError, match="at least 2 samples"):
        dispersive_loss(_features()[:1], temperature=1.0)


def test_two_ranks_average_to_the_gradient_of_the_whole_batch(tmp_path):
    """As FSDP averages: the mean over ranks of each one's gradient is the whole loss's."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_work, args=(rank, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    weight = torch.ones(5, requires_grad=True)
    dispersive_loss(_features() * weight, temperature=1.0).backward()
    torch.testing.assert_close((parts[0] + parts[1]) / 2, weight.grad)


def _work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    weight = torch.ones(5, requires_grad=True)
    features = _of_all_ranks(_features()[rank::2] * weight)
    dispersive_loss(features, temperature=1.0).backward()
    torch.save(weight.grad, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
