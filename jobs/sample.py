"""Sample pictures from a bundle and write them as a labelled grid.

python -m jobs.sample --bundle runs/demo/ddt/bundle --out samples.png --per-label 8
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs.cluster import connect
from jobs.console import make_parser, run_job
from jobs.picture_grid import draw_grid
from pipelines.generate import generate_pictures
from udiff.bundle import load_bundle
from udiff.system import FamilyRecipe


def sample_grid(
    bundle: str, out: Path, *, labels: list[int], per_label: int, workers: int, **request: Any
) -> float:
    """Write a grid with one row per label; picture k of a row has seed `request["seed"] + k`.

    Returns images per second.
    """
    recipe = load_bundle(bundle).recipe
    names = label_names(recipe)
    seed = request.pop("seed", 0)
    requests = [
        {"label": label, "seed": seed + k, **request} for label in labels for k in range(per_label)
    ]
    connect()
    generated = generate_pictures(str(Path(bundle).absolute()), requests, workers=workers)
    zoom = max(1, 64 // generated.pictures.shape[1])
    grid = draw_grid(
        generated.pictures, [names[label] for label in labels], columns=per_label, zoom=zoom
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    grid.save(out)
    return generated.images_per_s


def label_names(recipe: FamilyRecipe) -> list[str]:
    """Name every label: by its class name where one is known, else by its number."""
    count = getattr(recipe, "num_classes", 0)
    return list(recipe.data.class_names) or [str(label) for label in range(count)]


def parse_labels(text: str, recipe: FamilyRecipe) -> list[int]:
    """Read labels given by name or number, separated by commas; `all` for every one.

    Raises:
        ValueError: there is no such label.
    """
    names = label_names(recipe)
    if text == "all":
        return list(range(len(names)))
    labels = []
    for part in (part.strip() for part in text.split(",")):
        label = names.index(part) if part in names else int(part) if part.isdecimal() else -1
        if not 0 <= label < len(names):
            raise ValueError(f"--labels: there is no {part!r}; there are {', '.join(names)}")
        labels.append(label)
    return labels


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    return run_job(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.per_label < 1:
        raise ValueError(f"--per-label must be at least 1, got {options.per_label}")
    sample_grid(
        options.bundle,
        options.out,
        labels=parse_labels(options.labels, load_bundle(options.bundle).recipe),
        per_label=options.per_label,
        workers=options.workers,
        seed=options.seed,
        num_steps=options.steps,
        guidance_scale=options.guidance,
    )
    print(f"wrote {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.sample", __doc__)
    add = parser.add_argument
    add("--bundle", required=True, help="folder of the bundle")
    add("--out", type=Path, default=Path("samples.png"), help="(default: %(default)s)")
    add("--labels", default="all", help="names or numbers, as in bag,3 (default: all)")
    add("--per-label", type=int, default=8, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first picture (default: %(default)s)")
    add("--steps", type=int, help="sampler steps (default: the recipe's)")
    add("--guidance", type=float, help="guidance scale (default: the recipe's)")
    add("--workers", type=int, default=1, help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
