"""What reading, drawing, logging and checkpoints cost: `jobs.train` against bare steps.

    python -m benchmarks.train_loop

Both sides run in the same two Ray Train workers, in turn, with the same network under the same
FSDP2 units: one is the trainer on a cache with everything on; the other repeats forward, backward,
clipping and AdamW on one batch, whose draws are made beforehand, without an average of the weights.
"""

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.machine import record, spread
from jobs.cluster import connect
from jobs.console import make_parser
from tests.made import save_autoencoder, write_latents
from udiff.recipe import load_recipe, parse_recipe
from udiff.system import FamilyRecipe


@dataclass(frozen=True)
class Options:
    """What is compared."""

    dim: int
    steps: int
    rounds: int
    workers: int
    shard: str


def main() -> None:
    """Measure, and record the ratio of each round."""
    parser = make_parser("benchmarks.train_loop", __doc__)
    parser.add_argument("--dim", type=int, default=256, help="width of the network")
    parser.add_argument("--steps", type=int, default=40, help="steps of a round and side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard", choices=["root", "blocks"], default="blocks")
    options = Options(**vars(parser.parse_args()))
    connect()
    with tempfile.TemporaryDirectory() as folder:
        rounds = _measure_on_workers(_recipe(options, Path(folder)), options, folder)
    ratios = [r["trainer_images_per_s"] / r["bare_images_per_s"] for r in rounds]
    record(
        "train_loop",
        {
            **asdict(options),
            "trainer_images_per_s": spread([r["trainer_images_per_s"] for r in rounds]),
            "bare_images_per_s": spread([r["bare_images_per_s"] for r in rounds]),
            "bare_step_ms": spread([64_000 / r["bare_images_per_s"] for r in rounds]),
            "ratio": spread(ratios),
        },
    )


def _recipe(options: Options, folder: Path) -> FamilyRecipe:
    save_autoencoder(folder / "autoencoder")
    write_latents(
        folder / "latents",
        autoencoder=folder / "autoencoder",
        rows=4096,
        rows_per_file=1024,
        row_group_size=256,
    )
    return load_recipe(
        "ddt/debug",
        [
            f"network={{dim: {options.dim}, num_heads: 4, num_blocks: 6, num_encoder_blocks: 4}}",
            f"data.cache={folder / 'latents'}",
            f"autoencoder.path={folder / 'autoencoder'}",
            f"train.images={options.steps * 64}",
            f"train.shard={options.shard}",
            "train.checkpoint_every=250",
        ],
    )


def _measure_on_workers(
    recipe: FamilyRecipe, options: Options, folder: str
) -> list[dict[str, float]]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "folder": folder,
            "options": asdict(options),
        },
        scaling_config=ScalingConfig(
            num_workers=options.workers, use_gpu=torch.cuda.is_available()
        ),
        run_config=RunConfig(storage_path=f"{folder}/ray"),
    )
    return trainer.fit().return_value["rounds"]


def _work(config: dict[str, Any]) -> dict[str, Any]:
    from jobs.ray_run import RayRun
    from udiff.fit import fit
    from udiff.resolve import resolve

    options = Options(**config["options"])
    recipe = parse_recipe(config["recipe"], source="benchmark")
    run, resolved = RayRun(recipe.family), resolve(recipe)
    rounds = []
    for number in range(options.rounds):
        bare = _bare_steps(resolved.recipe, options.steps, run)
        report = fit(resolved, folder=Path(config["folder"]) / f"run{number}", run=run)
        rounds.append({"trainer_images_per_s": report.images_per_s, "bare_images_per_s": bare})
    return {"rounds": rounds}


def _bare_steps(recipe: FamilyRecipe, steps: int, run: Any) -> float:
    from udiff.system import Rng
    from udiff.training.optimizer import clip_gradients, make_optimizer
    from udiff.training.shard import shard

    torch.manual_seed(0)
    system = recipe.build()
    shard(system, recipe.train, run)
    [phase] = system.phases
    modules = [system.modules[name] for name in phase.modules]
    optimizer = make_optimizer(modules, phase.optimizer)
    rows = recipe.train.batch_size // run.world_size
    batch = {
        "latent_mean": torch.randn(rows, 4, 8, 8, device=run.device),
        "latent_logvar": torch.full((rows, 4, 8, 8), -4.0, device=run.device),
        "label": torch.zeros(rows, dtype=torch.long, device=run.device),
    }
    draws = phase.draw(batch, Rng(0, device=run.device).at(0))
    times = []
    for _ in range(steps):
        phase.loss(batch, draws).total.backward()
        clip_gradients(optimizer, phase.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    dist.barrier()
    return recipe.train.batch_size * (steps - 1) / (times[-1] - times[0])


if __name__ == "__main__":
    main()
