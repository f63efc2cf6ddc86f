"""Exactness of training: repeats, resumes and other numbers of ranks give the same run."""

import json
import multiprocessing as mp
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.made import save_autoencoder, write_latents
from udiff.fit import fit
from udiff.recipe import load_recipe
from udiff.resolve import resolve
from udiff.system import FamilyRecipe
from udiff.training.log import FolderLock, read_metrics
from udiff.training.run import local_run

STEPS = 12
OVERRIDES = (
    "network={dim: 32, num_heads: 2, num_blocks: 3, num_encoder_blocks: 2}",
    f"train.images={STEPS * 32}",
    "train.batch_size=32",
    "train.log_every=1",
    "train.checkpoint_every=5",
    "optimizer.warmup_steps=3",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_autoencoder(folder / "autoencoder")
    write_latents(folder / "latents", autoencoder=folder / "autoencoder")
    return folder


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(debug_recipe(made), folder)
    return folder


def debug_recipe(made: Path, *overrides: str) -> FamilyRecipe:
    paths = (f"data.cache={made / 'latents'}", f"autoencoder.path={made / 'autoencoder'}")
    return load_recipe("ddt/debug", (*OVERRIDES, *paths, *overrides))


def train(recipe: FamilyRecipe, folder: Path, *, ranks: int = 1) -> None:
    """Train in this process, or several ranks in processes of their own."""
    if ranks == 1:
        with local_run() as run:
            fit(resolve(recipe), folder=folder, run=run)
        return
    processes = start(recipe, folder, ranks=ranks)
    for process in processes:
        process.join()
        assert process.exitcode == 0


def start(recipe: FamilyRecipe, folder: Path, *, ranks: int = 1) -> list[mp.Process]:
    context = mp.get_context("spawn")
    folder.mkdir(parents=True, exist_ok=True)
    rendezvous = folder / f"rendezvous-{time.monotonic_ns()}"
    processes = [
        context.Process(target=_work, args=(recipe, folder, rank, ranks, rendezvous))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def _work(recipe: FamilyRecipe, folder: Path, rank: int, ranks: int, rendezvous: Path) -> None:
    torch.set_num_threads(1)
    with local_run(rank, ranks, rendezvous=rendezvous) as run:
        fit(resolve(recipe), folder=folder, run=run)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "bundle" / "weights.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_learns(undisturbed):
    recorded = losses(undisturbed)
    assert [step for step, _ in recorded] == list(range(1, STEPS + 1))
    assert recorded[-1][1] < recorded[0][1]


@pytest.mark.parametrize("kill_after_step", [1, 7])
def test_a_killed_run_ends_like_one_that_was_not(made, undisturbed, tmp_path, kill_after_step):
    recipe = debug_recipe(made)
    [process] = start(recipe, tmp_path)
    while len(losses(tmp_path)) < kill_after_step:
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    train(recipe, tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_a_checkpoint_cut_short_is_passed_over(made, undisturbed, tmp_path):
    train(debug_recipe(made), tmp_path)
    newest = tmp_path / "checkpoints" / f"step_{STEPS:08d}"
    (newest / ".metadata").unlink()
    train(debug_recipe(made), tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_two_ranks_give_the_losses_of_one(made, undisturbed, tmp_path):
    train(debug_recipe(made), tmp_path, ranks=2)
    for (step, ours), (_, theirs) in zip(losses(tmp_path), losses(undisturbed), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5), step


@pytest.mark.parametrize("override", ["train.accumulate=2", "train.shard=blocks"])
def test_cutting_the_work_otherwise_changes_rounding_alone(made, undisturbed, tmp_path, override):
    train(debug_recipe(made, override), tmp_path)
    for (step, ours), (_, theirs) in zip(losses(tmp_path), losses(undisturbed), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5), step


def test_bfloat16_learns_the_same_to_its_precision(made, undisturbed, tmp_path):
    train(debug_recipe(made, "train.precision=bf16"), tmp_path)
    for (step, ours), (_, theirs) in zip(losses(tmp_path), losses(undisturbed), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2), step
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}


@pytest.mark.long
def test_a_second_job_in_the_same_folder_is_refused(made, tmp_path):
    recipe = debug_recipe(made, "train.images=100_000")
    [process] = start(recipe, tmp_path)
    while not losses(tmp_path):
        time.sleep(0.01)
    with pytest.raises(TimeoutError, match="another job is training into"):
        FolderLock(tmp_path, timeout_s=0.3)
    process.kill()
    process.join()
    FolderLock(tmp_path, timeout_s=5).release()


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    row = json.dumps({"step": 1, "loss": 2.0})
    (tmp_path / "metrics.jsonl").write_text(f'{row}\n{{"step": 2, "lo')
    assert losses(tmp_path) == [(1, 2.0)]


def test_a_batch_that_cannot_be_dealt_out_is_refused(made, tmp_path):
    recipe = debug_recipe(made, "train.batch_size=33", "train.accumulate=2")
    message = r"train.batch_size must be a multiple .* = 2, got 33"
    with local_run() as run, pytest.raises(ValueError, match=message):
        fit(resolve(recipe), folder=tmp_path, run=run)
