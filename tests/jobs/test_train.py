"""`python -m jobs.train` as a user runs it: killed, restarted, and asked for what cannot be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.train import main
from tests.made import save_autoencoder, write_latents
from tests.training.test_trainer import STEPS, assert_same_run, debug_recipe, losses, train
from udiff.recipe import dump_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_autoencoder(folder / "autoencoder")
    write_latents(folder / "latents", autoencoder=folder / "autoencoder")
    write_latents(folder / "other", autoencoder=folder / "autoencoder", seed=1)
    save_autoencoder(folder / "another_autoencoder", seed=2)
    return folder


@pytest.fixture(scope="module")
def recipe_file(made) -> Path:
    """A recipe written out, as the run folder holds it."""
    file = made / "recipe.yaml"
    file.write_text(dump_recipe(debug_recipe(made)))
    return file


def start(recipe_file: Path, run: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable, "-m", "jobs.train", "--recipe", str(recipe_file), "--run", str(run),
            "--workers", "2",
        ],
        cwd=ROOT, env={**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.long
def test_a_killed_driver_and_a_killed_worker_cost_nothing(made, recipe_file, tmp_path):
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    train(debug_recipe(made), undisturbed, ranks=2)
    job = start(recipe_file, run)
    wait_for_step(job, run, 2)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    job = start(recipe_file, run)
    wait_for_step(job, run, 6)
    os.kill(worker_of(run), signal.SIGKILL)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err
    assert f"{STEPS} steps done" in out
    assert_same_run(run, undisturbed)


def wait_for_step(job: subprocess.Popen, run: Path, step: int) -> None:
    while not any(done >= step for done, _ in losses(run)):
        assert job.poll() is None, job.communicate()
        time.sleep(0.005)


def worker_of(run: Path) -> int:
    """Find the process that holds the run's lock: its rank 0."""
    lock = (run / ".lock").stat()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].endswith(f":{lock.st_ino}"):
            return int(fields[4])
    pytest.fail("nobody holds the lock")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trane.images=1"], "trane is not a key of this recipe; did you mean train?"),
        (["data.cache=/nowhere/at/all"], "there is no cache at /nowhere/at/all"),
        (["autoencoder.path=/nowhere"], "autoencoder.path '/nowhere' is neither a bundle"),
        (["data.cache="], "data.cache is not set"),
        (["latent.height=16"], "holds latents of shape (4, 8, 8)"),
        (["train.batch_size=31"], "train.batch_size must be a multiple"),
    ],
)
def test_what_a_user_got_wrong_is_said_in_one_line(
    recipe_file, tmp_path, capsys, overrides, message
):
    run = tmp_path / "run"
    arguments = ["--recipe", str(recipe_file), "--run", str(run), "--workers", "2"]
    assert main([*arguments, *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not run.exists()


def test_a_cache_of_another_autoencoder_is_refused(made, recipe_file, tmp_path, capsys):
    other = f"autoencoder.path={made / 'another_autoencoder'}"
    arguments = ["--recipe", str(recipe_file), "--run", str(tmp_path / "run"), other]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "was made by another autoencoder" in error
    assert json.loads((made / "latents" / "manifest.json").read_text())["identity"]["latent"][
        "autoencoder"
    ][:32] in error  # fmt: skip


def test_a_run_folder_of_another_recipe_is_refused(made, recipe_file, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(debug_recipe(made, "optimizer.lr=1e-5")))
    assert main(["--recipe", str(recipe_file), "--run", str(tmp_path)]) == 2
    assert "is the run of another recipe: " in capsys.readouterr().err


def test_a_name_that_is_no_recipe_lists_those_that_are(tmp_path, capsys):
    assert main(["--recipe", "ddt/huge", "--run", str(tmp_path)]) == 2
    assert "recipe ddt/huge does not exist" in capsys.readouterr().err
