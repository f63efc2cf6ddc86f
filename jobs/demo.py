"""The main job on real pictures: web shards -> caches -> autoencoder and DDT -> samples -> report.

    python -m jobs.demo --out runs/demo

Takes about nine minutes on 2 CPU cores. Stopped and started again, it goes on where it was.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.cluster import connect
from jobs.console import make_parser, run_job
from jobs.evaluate import evaluate
from jobs.fashion_mnist import write_fashion_mnist
from jobs.fetch_weights import FetchError, fetch_lpips
from jobs.prepare import prepare_latents, prepare_pictures
from jobs.report import write_report
from jobs.sample import label_names, sample_grid
from jobs.train import TrainingError, train_recipe
from pipelines.latents_settings import LatentsSettings
from pipelines.pictures import PicturesSettings
from pipelines.schedule import FailedUnitsError, PrepareReport
from udiff.bundle import load_bundle
from udiff.recipe import load_recipe
from udiff.training.log import read_metrics, select_losses

Facts = dict[str, Any]


class Demo:
    """The stages, each of which leaves its facts in a file: a finished stage is not done again."""

    def __init__(self, out: Path, *, workers: int) -> None:
        self.out = out
        self.workers = workers
        self._console = Console(stderr=True)

    def run(self) -> Facts:
        """Run all stages and collect their facts."""
        facts: Facts = {}
        for name, stage in self._stages().items():
            facts[name] = self._once(name, stage)
        return facts

    def _stages(self) -> dict[str, Callable[[], Facts]]:
        return {
            "shards": self._write_shards,
            "pictures": lambda: self._prepare_pictures("train", "pictures"),
            "held_out": lambda: self._prepare_pictures("held_out", "held_out"),
            "weights": self._fetch_weights,
            "autoencoder_stage1": self._train_autoencoder,
            "autoencoder": self._finish_autoencoder,
            "latents": self._prepare_latents,
            "ddt": self._train_ddt,
            "samples": self._sample,
            "evaluation": self._evaluate,
        }

    def _once(self, name: str, stage: Callable[[], Facts]) -> Facts:
        file = self.out / "stages" / f"{name}.json"
        if file.exists():
            self._console.print(f"[bold]{name}[/bold]: done before")
            return json.loads(file.read_text())
        self._console.print(f"[bold]{name}[/bold]")
        started = time.perf_counter()
        facts = stage() | {"wall_s": round(time.perf_counter() - started, 1)}
        file.parent.mkdir(parents=True, exist_ok=True)
        staged = file.with_suffix(".tmp")
        staged.write_text(json.dumps(facts, indent=1))
        staged.replace(file)
        return facts

    def _write_shards(self) -> Facts:
        counts = write_fashion_mnist(self.out / "shards", images=24_000, held_out=2_000)
        return counts._asdict()

    def _prepare_pictures(self, shards: str, cache: str) -> Facts:
        names = json.loads((self.out / "shards" / "classes.json").read_text())
        settings = PicturesSettings(
            input=str(self.out / "shards" / shards),
            output=str(self.out / cache),
            size=32,
            fit="pad",
            class_names=tuple(names),
            workers=self.workers,
        )
        return _describe(prepare_pictures(settings))

    def _fetch_weights(self) -> Facts:
        return {"bytes": fetch_lpips().stat().st_size}

    def _train_autoencoder(self) -> Facts:
        """Learn to reconstruct, which is quick; LPIPS, the game and alignment come after."""
        pictures = f"data.cache={self.out / 'pictures'}"
        return self._train("vavae/demo_stage1", "autoencoder_stage1", pictures)

    def _finish_autoencoder(self) -> Facts:
        return self._train(
            "vavae/demo_stage2",
            "autoencoder",
            f"data.cache={self.out / 'pictures'}",
            f"initialize_from={self.out / 'autoencoder_stage1' / 'bundle'}",
            f"objective.perceptual_path={fetch_lpips()}",
        )

    def _prepare_latents(self) -> Facts:
        settings = LatentsSettings(
            input=str(self.out / "pictures"),
            output=str(self.out / "latents"),
            autoencoder=str(self.out / "autoencoder" / "bundle"),
            workers=self.workers,
        )
        return _describe(prepare_latents(settings))

    def _train_ddt(self) -> Facts:
        autoencoder = self.out / "autoencoder" / "bundle"
        return self._train(
            "ddt/debug",
            "ddt",
            f"data.cache={self.out / 'latents'}",
            f"autoencoder.path={autoencoder}",
            "train.images=44_000",  # more than the recipe: there is time
        )

    def _train(self, recipe: str, folder: str, *overrides: str) -> Facts:
        run = self.out / folder
        report = train_recipe(load_recipe(recipe, overrides), run_folder=run, workers=self.workers)
        losses = [next(iter(select_losses(row).values())) for row in read_metrics(run)]
        return {
            "recipe": recipe,
            "num_steps": report.num_steps,
            "images_per_s": report.images_per_s,
            "loss_first": losses[0],
            "loss_last": losses[-1],
        }

    def _sample(self) -> Facts:
        bundle = self.out / "ddt" / "bundle"
        labels = list(range(len(label_names(load_bundle(bundle).recipe))))
        images_per_s = sample_grid(
            str(bundle),
            self.out / "samples.png",
            labels=labels,
            per_label=8,
            workers=self.workers,
        )
        return {"pictures": len(labels) * 8, "images_per_s": images_per_s}

    def _evaluate(self) -> Facts:
        evaluation = evaluate(
            str(self.out / "ddt" / "bundle"),
            reference=str(self.out / "held_out"),
            real=str(self.out / "pictures"),
            workers=self.workers,
        )
        return asdict(evaluation)


def _describe(report: PrepareReport) -> Facts:
    manifest = report.manifest
    return {
        "images_in": manifest.images_in,
        "images_cached": manifest.num_rows,
        "images_rejected": sum(manifest.rejected.values()),
        "rejected": manifest.rejected,
        "images_per_s": report.images_per_s,
    }


def summarize(stages: Facts) -> Facts:
    """Put the figures that matter on top of the stages' own."""
    pictures, ddt, evaluation = stages["pictures"], stages["ddt"], stages["evaluation"]
    return {
        **{name: pictures[name] for name in ("images_in", "images_cached", "images_rejected")},
        "pictures_images_per_s": pictures["images_per_s"],
        "cache_images_per_s": stages["latents"]["images_per_s"],
        "autoencoder_images_per_s": stages["autoencoder"]["images_per_s"],
        "train_images_per_s": ddt["images_per_s"],
        "sample_images_per_s": stages["samples"]["images_per_s"],
        "loss_first": ddt["loss_first"],
        "loss_last": ddt["loss_last"],
        **{name: value for name, value in evaluation.items() if name.startswith("frechet_")},
        "wall_s": round(sum(stage["wall_s"] for stage in stages.values()), 1),
        "stages": stages,
    }


def _print_table(report: Facts) -> None:
    table = Table("figure", "value", title="udiff demo")
    for name, value in report.items():
        if name != "stages":
            table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


def _run(options: argparse.Namespace) -> None:
    connect()
    report = summarize(Demo(options.out, workers=options.workers).run())
    write_report(options.out, report)
    _print_table(report)
    print(f"pictures: {options.out / 'samples.png'}   report: {options.out / 'report.html'}")
    print("serve it: make serve")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = make_parser("jobs.demo", __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="(default: runs/demo)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args(arguments)
    return run_job(lambda: _run(options), failures=(FetchError, TrainingError, FailedUnitsError))


if __name__ == "__main__":
    sys.exit(main())
