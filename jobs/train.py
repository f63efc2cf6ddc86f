"""Train a recipe with Ray Train: FSDP2 over all workers.

    python -m jobs.train --recipe ddt/debug --run runs/ddt --workers 2 train.images=80000

A run that was stopped or killed goes on from its last checkpoint when the same command is given
again. At its end the run folder holds `bundle/`, which is sampled, evaluated and served.
"""

import argparse
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.cluster import connect
from jobs.console import UserError, make_parser, run_job
from jobs.follow import follow_run
from udiff.data.manifest import identity_difference
from udiff.data.storage import open_folder
from udiff.fit import FitReport
from udiff.recipe import dump_recipe, load_recipe, parse_recipe, update_recipe
from udiff.resolve import resolve
from udiff.system import FamilyRecipe
from udiff.training.trainer import check_batch

RECIPE = "recipe.yaml"
_FREE_TO_CHANGE = ("log_every", "checkpoint_every", "keep_checkpoints")
"""Keys of `train` that may differ when a run goes on."""


class TrainingError(RuntimeError):
    """The workers failed, more often than was allowed."""


def train_recipe(
    recipe: FamilyRecipe,
    *,
    run_folder: str | Path,
    workers: int,
    gpus: bool = False,
    max_failures: int = 3,
) -> FitReport:
    """Train on the cluster, and return when the bundle is written.

    Args:
        recipe: with its cache named.
        run_folder: checkpoints, metrics and bundle; a folder that all workers reach.
        workers: processes, one per GPU where `gpus` is set and else one per CPU.
        gpus: train on GPUs.
        max_failures: workers that may die before the run is given up; it goes on without loss.

    Raises:
        TrainingError: the workers failed.
        UserError: the folder is another recipe's run.
        ValueError, FileNotFoundError: recipe, cache and autoencoder do not fit together.
    """
    check_batch(recipe.train, workers)
    recipe = resolve(_with_absolute_paths(recipe)).recipe
    folder = Path(run_folder).absolute()
    _claim(folder, recipe)
    connect()
    with follow_run(folder, recipe):
        return _fit_on_cluster(recipe, folder, workers, gpus, max_failures)


def _fit_on_cluster(
    recipe: FamilyRecipe, folder: Path, workers: int, gpus: bool, max_failures: int
) -> FitReport:
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    trainer = TorchTrainer(
        _work,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
        # A name of its own: Ray silently continues a run of that name, and resuming is ours.
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=str(folder / ".ray"),
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(f"training failed: {_cause(error)}") from error
    return FitReport(**result.return_value)


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """Run on each worker."""
    from jobs.ray_run import RayRun
    from udiff.fit import fit

    recipe = parse_recipe(config["recipe"], source=f"{config['folder']}/{RECIPE}")
    run = RayRun(recipe.family)
    return asdict(fit(resolve(recipe), folder=Path(config["folder"]), run=run))


def _with_absolute_paths(recipe: FamilyRecipe) -> FamilyRecipe:
    """Workers have working folders of their own."""
    changes = _absolute_paths(recipe.model_dump(mode="json"))
    if recipe.data.cache:
        changes["data"] = {"cache": str(open_folder(recipe.data.cache))}
    return update_recipe(recipe, changes)


def _absolute_paths(keys: dict[str, Any]) -> dict[str, Any]:
    """List the keys of files and folders of this machine, nested, with absolute values."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, dict):
            if inside := _absolute_paths(value):
                found[key] = inside
        elif key.endswith(("path", "initialize_from")) and value and Path(value).exists():
            found[key] = str(Path(value).absolute())
    return found


def _claim(folder: Path, recipe: FamilyRecipe) -> None:
    """Write the recipe into a new run folder, or check that the run there has the same."""
    file = folder / RECIPE
    if file.exists():
        found = load_recipe(str(file)).model_dump(mode="json")
        wanted = recipe.model_dump(mode="json")
        for key in _FREE_TO_CHANGE:
            found["train"].pop(key), wanted["train"].pop(key)
        if differences := identity_difference(wanted, found):
            raise UserError(
                f"{folder} is the run of another recipe: {'; '.join(differences)}; name another "
                "--run, or delete it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    open_folder(folder).write(RECIPE, dump_recipe(recipe).encode())


def _cause(error: BaseException) -> str:
    """Find the one line that says what went wrong in a worker."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    causes = [str(failure).strip().splitlines()[-1] for failure in failures.values()]
    return causes[0]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    return run_job(lambda: _run(options), failures=(TrainingError,))


def _run(options: argparse.Namespace) -> None:
    report = train_recipe(
        load_recipe(options.recipe, options.overrides),
        run_folder=options.run,
        workers=options.workers,
        gpus=options.gpus,
        max_failures=options.max_failures,
    )
    print(f"{report.num_steps} steps done, {report.images_per_s:.0f} images/s: {report.bundle}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.train", __doc__)
    add = parser.add_argument
    add("--recipe", required=True, help="name (ddt/debug) or path of a YAML file")
    add("--run", required=True, help="run folder, made or continued")
    add("--workers", type=int, default=1, help="training processes (default: 1)")
    add("--gpus", action="store_true", help="one GPU per worker")
    add("--max-failures", type=int, default=3, help="worker deaths to survive (default: 3)")
    add("overrides", nargs="*", help="recipe keys: optimizer.lr=1e-4 data.cache=DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
