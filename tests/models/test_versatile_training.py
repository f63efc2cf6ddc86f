"""Training Versatile Diffusion: flows drawn alike on all ranks, stages that grow, exact resumes."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.made import save_clip
from tests.models.versatile_made import make_versatile, small_recipe
from tests.training.test_trainer import start, train
from udiff.bundle import load_bundle
from udiff.models.versatile.cached import CLIP_IMAGE, CLIP_TEXT, TEXT_LATENT
from udiff.resolve import resolve
from udiff.system import Rng
from udiff.training.log import read_metrics

FLOWS = ("text_to_image", "image_variation", "image_to_text", "text_variation")
DRAWN = "objective.flows_per_step=1"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("versatile")
    make_versatile(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(small_recipe(made, DRAWN), folder)
    return folder


def _losses(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if "mse" in k} for row in read_metrics(folder)]


def _assert_same_weights(one: Path, other: Path) -> None:
    first, second = (load_file(f / "bundle" / "weights.safetensors") for f in (one, other))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_a_step_takes_as_many_flows_as_are_asked_for(made):
    [phase] = small_recipe(made, "objective.flows_per_step=2").build().phases
    batch = {
        "latent_mean": torch.zeros(2, 4, 8, 8),
        TEXT_LATENT: torch.zeros(2, 1, 20),
        CLIP_TEXT: torch.zeros(2, 20, 24),
        CLIP_IMAGE: torch.zeros(2, 10, 24),
    }

    def flows(step: int, rank: int) -> set[str]:
        draws = phase.draw(batch, Rng(0, rank, 2).at(step))
        return {key.partition("/")[0] for key in draws} - {"posterior_noise"}

    taken = [flows(step, 0) for step in range(12)]
    assert all(len(each) == 2 for each in taken)
    assert set().union(*taken) == set(FLOWS)
    assert taken == [flows(step, 1) for step in range(12)]


@pytest.mark.long
def test_stages_grow_from_one_another(made, tmp_path):
    short = "train.images=32"
    train(small_recipe(made, short, name="debug_single"), tmp_path / "single")
    first = f"initialize_from={tmp_path / 'single' / 'bundle'}"
    train(small_recipe(made, short, first, name="debug_dual"), tmp_path / "dual")
    second = f"initialize_from={tmp_path / 'dual' / 'bundle'}"
    train(small_recipe(made, short, second), tmp_path / "four")
    assert set(load_bundle(tmp_path / "single" / "bundle").system.tasks) == {"image_variation"}
    assert set(FLOWS) < set(load_bundle(tmp_path / "four" / "bundle").system.tasks)
    assert set(_losses(tmp_path / "four")[-1]) == {f"{flow}_mse" for flow in FLOWS}


def test_layers_learn_at_their_own_pace(made, tmp_path):
    still = "objective.scales={text_data: {lr: 0.0}, image_context: {gradient: 0.5}}"
    recipe = small_recipe(made, still, "train.images=64")
    torch.manual_seed(recipe.train.seed)
    before = recipe.build().modules["denoiser"].state_dict()
    train(recipe, tmp_path / "run")
    after = load_file(tmp_path / "run" / "bundle" / "weights.safetensors")
    moved = {
        key.rsplit("_blocks", 1)[0]
        for key in before
        if not torch.equal(before[key], after[f"denoiser.{key}"])
    }
    assert "diffuser.text.data" not in moved
    assert {"diffuser.text.context", "diffuser.image.data", "diffuser.image.context"} <= moved


def test_a_cache_of_other_encoders_is_refused(made):
    save_clip(made / "other_clip", seed=99)
    with pytest.raises(ValueError, match="clip_"):
        resolve(small_recipe(made, f"clip.path={made / 'other_clip'}"))


@pytest.mark.long
@pytest.mark.parametrize("steps", [2, 4])
def test_a_resumed_run_is_the_run_that_was_never_stopped(made, undisturbed, tmp_path, steps):
    """With flows drawn one a step: layers that have not learned yet have their state, too."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "bundle")
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name > f"step_{steps:08d}":
            shutil.rmtree(checkpoint)
    train(small_recipe(made, DRAWN), folder)
    _assert_same_weights(undisturbed, folder)


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_weights(made, undisturbed, tmp_path):
    folder = tmp_path / "run"
    recipe = small_recipe(made, DRAWN)
    [process] = start(recipe, folder)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step_00000002/.metadata")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    train(recipe, folder)
    _assert_same_weights(undisturbed, folder)


@pytest.mark.long
def test_two_ranks_give_the_losses_of_one(made, undisturbed, tmp_path):
    train(small_recipe(made, DRAWN), tmp_path / "two", ranks=2)
    one, two = _losses(undisturbed), _losses(tmp_path / "two")
    assert [row.keys() for row in one] == [row.keys() for row in two]  # the same flows
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, rel=1e-5)
