"""Sample from a bundle.

    python -m jobs.sample --bundle runs/demo/ddt/bundle --out samples.png --per-label 8
    python -m jobs.sample --bundle BUNDLE --task image_to_text --requests FILE.jsonl --out answers

Models of classes draw a labelled grid. With --requests any task answers one request a line (JSON,
as `{"prompt": "a red apple", "seed": 3}`; a picture is the path of a file): --out is then a folder,
with `outputs.jsonl` and a PNG for each picture.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel

from jobs.cluster import connect
from jobs.console import UserError, make_parser, run_job
from jobs.picture_grid import draw_grid
from pipelines.generate import Generated, generate
from pipelines.json_lines import read_json_lines
from udiff.bundle import load_bundle
from udiff.data.storage import open_folder
from udiff.requests import picture_fields, record_fields
from udiff.system import FamilyRecipe, System, Task

CLASS_TASK = "class_to_image"
OUTPUTS = "outputs.jsonl"


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
    generated = generate(str(Path(bundle).absolute()), requests, task=CLASS_TASK, workers=workers)
    zoom = max(1, 64 // generated.pictures.shape[1])
    grid = draw_grid(
        generated.pictures, [names[label] for label in labels], columns=per_label, zoom=zoom
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    grid.save(out)
    return generated.outputs_per_s


def sample_requests(
    bundle: str, task: str | None, file: Path, out: Path, *, workers: int
) -> Generated:
    """Answer the requests of a file, one a line, and write the outputs into a folder.

    Raises:
        UserError: a line is no request, or there is no such task.
    """
    found = _find_task(load_bundle(bundle).system, task)
    requests = read_requests(file, found)
    connect()
    generated = generate(str(Path(bundle).absolute()), requests, task=found.name, workers=workers)
    _write_outputs(out, file, generated)
    return generated


def read_requests(file: Path, task: Task) -> list[dict[str, Any]]:
    """Read requests, one a line, and the pictures that they name (relative to the file).

    Raises:
        ValueError: a line is no JSON object.
        UserError: it is no request of the task, or a picture is missing.
    """
    requests = []
    for number, line in read_json_lines(file):
        try:
            request = open_pictures(line, task.request, file.parent)
            task.request.model_validate(request)
        except (ValueError, OSError) as error:
            raise UserError(f"{file} line {number}: {error}") from None
        requests.append(request)
    if not requests:
        raise UserError(f"{file} holds no requests")
    return requests


def open_pictures(request: Any, kind: type[BaseModel], folder: Path) -> dict[str, Any]:
    """Read the pictures that a request, or a record in it, names by files relative to a folder.

    Raises:
        UserError: it is no request.
        OSError: a picture is missing.
    """
    if not isinstance(request, Mapping):
        raise UserError(f"a request is a JSON object, got {type(request).__name__}")
    pictures = {
        name: (folder / request[name]).read_bytes()
        for name in picture_fields(kind) & request.keys()
    }
    records = {
        name: [open_pictures(each, record, folder) for each in request[name]]
        for name, record in record_fields(kind).items()
        if isinstance(request.get(name), list)
    }
    return {**request, **pictures, **records}


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


def _find_task(system: System, name: str | None) -> Task:
    if name is None and len(system.tasks) == 1:
        return next(iter(system.tasks.values()))
    if name is None or name not in system.tasks:
        raise UserError(f"--task must be one of {', '.join(system.tasks)}; got {name}")
    return system.tasks[name]


def _write_outputs(out: Path, file: Path, generated: Generated) -> None:
    out.mkdir(parents=True, exist_ok=True)
    asked, lines = [line.value for line in read_json_lines(file)], []
    for number, (request, output) in enumerate(zip(asked, generated.outputs, strict=True)):
        if isinstance(output, str):
            answer = {"text": output}
        else:
            answer = {"file": f"{number:05d}.png"}
            Image.fromarray(output).save(out / answer["file"])
        lines.append(json.dumps({"request": request, **answer}, ensure_ascii=False))
    open_folder(out).write(OUTPUTS, ("\n".join(lines) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    return run_job(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.requests is not None:
        out = options.out or Path("outputs")
        generated = sample_requests(
            options.bundle, options.task, options.requests, out, workers=options.workers
        )
        print(f"wrote {out}: {len(generated.outputs)} outputs, {generated.outputs_per_s:.2f}/s")
        return
    if options.per_label < 1:
        raise ValueError(f"--per-label must be at least 1, got {options.per_label}")
    bundle = load_bundle(options.bundle)
    if CLASS_TASK not in bundle.system.tasks:
        raise UserError(
            f"--requests FILE is needed: family {bundle.recipe.family} has no classes; its tasks "
            f"are {', '.join(bundle.system.tasks) or 'none'}"
        )
    out = options.out or Path("samples.png")
    sample_grid(
        options.bundle,
        out,
        labels=parse_labels(options.labels, bundle.recipe),
        per_label=options.per_label,
        workers=options.workers,
        seed=options.seed,
        num_steps=options.steps,
        guidance_scale=options.guidance,
    )
    print(f"wrote {out}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.sample", __doc__)
    add = parser.add_argument
    add("--bundle", required=True, help="folder of the bundle")
    add("--out", type=Path, help="(default: samples.png, or the folder outputs)")
    add("--workers", type=int, default=1, help="(default: %(default)s)")
    grid = parser.add_argument_group("a grid of classes")
    grid.add_argument("--labels", default="all", help="names or numbers, as bag,3 (default: all)")
    grid.add_argument("--per-label", type=int, default=8, help="(default: %(default)s)")
    grid.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    grid.add_argument("--steps", type=int, help="sampler steps (default: the recipe's)")
    grid.add_argument("--guidance", type=float, help="guidance scale (default: the recipe's)")
    any_task = parser.add_argument_group("any task")
    any_task.add_argument("--task", help="its name (default: the only one)")
    any_task.add_argument("--requests", type=Path, help="JSON lines, one request each")
    return parser


if __name__ == "__main__":
    sys.exit(main())
