"""Turn an official checkpoint into a bundle, and back.

    python -m jobs.convert --family ddt --checkpoint last.ckpt --config config.yaml --out bundle
    python -m jobs.convert --to-official --checkpoint bundle --out last.ckpt
    python -m jobs.convert --family dual_diffusion --checkpoint DIFFUSERS_FOLDER --out bundle

Nothing is guessed: keys that are missing or unknown are an error that lists them, and a checkpoint
that holds pickled objects other than tensors is refused. Tensors are the same bytes in both. Beside
an official file lies the official YAML, of families that have one and recipes that it can say.
"""

import argparse
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.console import UserError, make_parser, one_line, run_job
from udiff.bundle import RECIPE, TRAINING_WEIGHTS, WEIGHTS, resolve_encoders, save_bundle
from udiff.recipe import families, load_recipe, parse_recipe
from udiff.system import FamilyRecipe
from udiff.weights import TRAINING, check_weights, read_checkpoint


def to_bundle(family: str, checkpoint: Path, out: Path, *, config: Path | None = None) -> None:
    """Write the bundle of an official checkpoint.

    Raises:
        UserError: there is no such family, or it has no official checkpoints.
        ValueError: the checkpoint can't be used; the message lists the keys.
    """
    if checkpoint.is_dir():
        keys, weights = _find_folders(family).convert_folder(checkpoint, _read_config(config))
    else:
        converter = _find_converter(family)
        keys, weights = converter.convert_in(read_checkpoint(checkpoint), _read_config(config))
    recipe = parse_recipe(keys, source=str(config or checkpoint))
    with torch.device("meta"):
        system = recipe.build()
    sampled = {key: t for key, t in weights.items() if not key.startswith(TRAINING)}
    modules = torch.nn.ModuleDict({name: system.modules[name] for name in system.ema_modules})
    check_weights(modules, sampled, source=str(checkpoint))
    rest = {key: t for key, t in weights.items() if key.startswith(TRAINING)}
    about = f"# {family}\n\nConverted from the official checkpoint `{checkpoint.name}`.\n"
    save_bundle(out, recipe, sampled, about=about, training=rest)


def to_official(
    bundle: Path, out: Path, *, family: str | None = None, layout: str | None = None
) -> None:
    """Write a bundle's weights as an official checkpoint; safetensors where `out` ends so.

    Raises:
        UserError: the bundle is of another family, or its family has no official checkpoints; the
            layout holds more than tensors, which safetensors can't, or is none of the family's.
    """
    if not (bundle / RECIPE).is_file():
        raise UserError(f"--checkpoint {bundle} is not a bundle: it has no {RECIPE}")
    recipe = load_recipe(str(bundle / RECIPE))
    if family not in (None, recipe.family):
        raise UserError(f"--family: {bundle} is a bundle of family {recipe.family}, not {family}")
    weights = load_file(bundle / WEIGHTS)
    if (bundle / TRAINING_WEIGHTS).is_file():
        weights |= load_file(bundle / TRAINING_WEIGHTS)
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(f".{out.name}.part")
    if not out.suffix:
        _write_folder(recipe, weights, bundle, staged=staged, out=out)
        return
    official = _official(recipe, weights, layout)
    _save(official, staged, is_safetensors=out.suffix == ".safetensors")
    staged.replace(out)
    _write_config(recipe, out.with_suffix(".yaml"))


def _write_config(recipe: FamilyRecipe, path: Path) -> None:
    """Write the official YAML that goes with the weights, of families whose code reads one."""
    official_config = getattr(_find_converter(recipe.family), "official_config", None)
    if official_config is None:
        return
    try:
        config = official_config(recipe)
    except ValueError as error:
        print(f"no configuration is written: {one_line(error)}")
    else:
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        print(f"wrote {path}")


def _write_folder(
    recipe: FamilyRecipe, weights: Mapping[str, Tensor], bundle: Path, *, staged: Path, out: Path
) -> None:
    """Write a folder that appears complete, or not at all."""
    if out.exists():
        raise UserError(f"--out {out} exists; name another folder")
    shutil.rmtree(staged, ignore_errors=True)
    recipe = resolve_encoders(recipe, bundle)
    _find_folders(recipe.family).write_folder(recipe, weights, staged)
    staged.rename(out)


def _official(
    recipe: FamilyRecipe, weights: Mapping[str, Tensor], layout: str | None
) -> Mapping[str, Any]:
    converter = _find_converter(recipe.family)
    layouts = getattr(converter, "LAYOUTS", ())
    if layout is not None and layout not in layouts:
        known = ", ".join(layouts) or "one only: leave it out"
        raise UserError(f"--layout of family {recipe.family}: {known}; got {layout}")
    named = {} if layout is None else {"layout": layout}
    return converter.convert_out(recipe, weights, **named)


def _save(official: Mapping[str, Any], path: Path, *, is_safetensors: bool) -> None:
    if not is_safetensors:
        torch.save(official, path)
        return
    if not all(isinstance(value, Tensor) for value in official.values()):
        raise UserError(
            f"--out: this family's official layout holds {', '.join(official)}, which safetensors "
            "can't hold; name a .pt or .ckpt file"
        )
    save_file({key: tensor.contiguous() for key, tensor in official.items()}, path)


def _find_converter(family: str) -> ModuleType:
    known = [name for name in families() if _has_converter(name)]
    if family not in known:
        raise UserError(f"--family must be one of {', '.join(known)}; got {family}")
    return importlib.import_module(f"udiff.models.{family}.checkpoint")


def _has_converter(family: str, module: str = "checkpoint") -> bool:
    return importlib.util.find_spec(f"udiff.models.{family}.{module}") is not None


def _find_folders(family: str) -> ModuleType:
    """Find what reads and writes a family's checkpoints that are folders."""
    known = [name for name in families() if _has_converter(name, "folder")]
    if family not in known:
        raise UserError(
            f"checkpoints that are folders are those of {', '.join(known)}; {family} has files"
        )
    return importlib.import_module(f"udiff.models.{family}.folder")


def _read_config(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not valid YAML: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--config {path} must hold keys and values")
    return config


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    return run_job(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.to_official:
        to_official(options.checkpoint, options.out, family=options.family, layout=options.layout)
    elif options.family is None:
        raise UserError("--family is needed: it says whose checkpoint this is")
    else:
        to_bundle(options.family, options.checkpoint, options.out, config=options.config)
    print(f"wrote {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("jobs.convert", __doc__)
    add = parser.add_argument
    add("--family", help="whose checkpoint it is; a bundle knows")
    add(
        "--checkpoint",
        type=Path,
        required=True,
        help="official file or folder, or the bundle to write back",
    )
    add("--config", type=Path, help="official YAML; without it, what the weights tell is used")
    add("--out", type=Path, required=True, help="folder of the bundle, or official file to write")
    add("--layout", help="of the official file, of families that have several")
    add("--to-official", action="store_true", help="from a bundle to the official layout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
