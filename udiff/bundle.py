"""Bundles: what is sampled, served, exported and imported.

A bundle is a folder: `weights.safetensors` (keys `<module>.<parameter>`), `recipe.yaml`,
`README.md`, and for families that learn on latents `autoencoder/`, a bundle or a diffusers folder
of its own.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from udiff.autoencoders.kl import KLAutoencoder, load_diffusers_autoencoder
from udiff.recipe import dump_recipe, parse_recipe, update_recipe
from udiff.system import FamilyRecipe, System
from udiff.weights import load_strictly

WEIGHTS, RECIPE, README, AUTOENCODER = (
    "weights.safetensors",
    "recipe.yaml",
    "README.md",
    "autoencoder",
)


@dataclass(frozen=True)
class Bundle:
    """A trained system, in evaluation mode."""

    path: Path
    recipe: FamilyRecipe
    system: System


def load_bundle(path: str | Path) -> Bundle:
    """Load a bundle's recipe and weights.

    Raises:
        FileNotFoundError: there is no bundle.
        ValueError: weights and recipe do not fit together.
    """
    path = Path(path)
    for name in (RECIPE, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not a bundle: it has no {name}")
    recipe = parse_recipe(yaml.safe_load((path / RECIPE).read_text()), source=str(path / RECIPE))
    if recipe.autoencoder is not None:
        resolved = recipe.autoencoder.relative_to(path)
        recipe = recipe.model_copy(update={"autoencoder": resolved})
    system = recipe.build()
    _load_weights(system, load_file(path / WEIGHTS), path)
    for module in system.modules.values():
        module.eval().requires_grad_(False)
    return Bundle(path, recipe, system)


def save_bundle(
    path: str | Path, recipe: FamilyRecipe, weights: Mapping[str, Tensor], *, about: str
) -> None:
    """Write a bundle as a whole: it appears complete, or not at all; an older one is replaced.

    Args:
        path: folder of the bundle.
        recipe: resolved; a local autoencoder that it names is copied into the bundle.
        weights: full tensors, keys `<module>.<parameter>`.
        about: text of the README.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        if recipe.autoencoder is not None and Path(recipe.autoencoder.path).is_dir():
            shutil.copytree(recipe.autoencoder.path, staged / AUTOENCODER)
            recipe = update_recipe(recipe, {"autoencoder": {"path": AUTOENCODER}})
        save_file({name: t.contiguous() for name, t in weights.items()}, staged / WEIGHTS)
        (staged / RECIPE).write_text(dump_recipe(recipe))
        (staged / README).write_text(about)
        staged.chmod(0o755)
        _replace(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def load_autoencoder(path: str) -> KLAutoencoder:
    """Load an autoencoder by a hub id, a local diffusers folder, or a bundle of a family of them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the bundle holds another kind of system.
    """
    if not (Path(path) / RECIPE).is_file():
        return load_diffusers_autoencoder(path)
    bundle = load_bundle(path)
    autoencoder = bundle.system.modules.get("autoencoder")
    if not isinstance(autoencoder, KLAutoencoder):
        raise ValueError(
            f"autoencoder.path {path!r} is a bundle of family {bundle.recipe.family}, not of an "
            "autoencoder"
        )
    return autoencoder


def load_latent_decoder(recipe: FamilyRecipe) -> KLAutoencoder:
    """Load the autoencoder of a latent family, normalizing as its training did."""
    settings = recipe.autoencoder
    if settings is None:
        raise ValueError(f"family {recipe.family} learns on pixels; it has no autoencoder")
    autoencoder = load_autoencoder(settings.path)
    if settings.mean is not None and settings.std is not None:
        autoencoder.set_statistics(*settings.statistics(len(settings.mean)))
    return autoencoder


def _load_weights(system: System, weights: Mapping[str, Tensor], path: Path) -> None:
    names = system.ema_modules or tuple(system.modules)
    modules = nn.ModuleDict({name: system.modules[name] for name in names})
    load_strictly(modules, weights, source=str(path / WEIGHTS))


def _replace(staged: Path, path: Path) -> None:
    if not path.exists():
        staged.rename(path)
        return
    # A folder can't be renamed over another: the old one steps aside for the moment in between.
    old = path.with_name(f".{path.name}-old-{os.getpid()}")
    path.rename(old)
    staged.rename(path)
    shutil.rmtree(old, ignore_errors=True)
