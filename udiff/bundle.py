"""Bundles: what is sampled, served, exported and imported.

A bundle is a folder: `weights.safetensors` (keys `<module>.<parameter>`), `recipe.yaml`,
`README.md`, and under the name of its recipe key every small frozen network that the recipe takes
from a local path: `autoencoder/` for families that learn on latents, `text_encoder/`, ...
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from udiff.autoencoders.kl import KLAutoencoder, load_diffusers_autoencoder
from udiff.autoencoders.ldm_checkpoint import load_ldm_autoencoder, names_a_checkpoint
from udiff.recipe import dump_recipe, parse_recipe
from udiff.settings import EncoderSettings, Settings
from udiff.system import FamilyRecipe, System
from udiff.weights import load_strictly

WEIGHTS, RECIPE, README = "weights.safetensors", "recipe.yaml", "README.md"
COPY_LIMIT_BYTES = 2**30
"""Size up to which a bundle carries an encoder with it."""
TRAINING_WEIGHTS = "training.safetensors"
"""What only further training needs, of imported checkpoints that have it."""

S = TypeVar("S", bound=Settings)
R = TypeVar("R", bound=FamilyRecipe)
ChangeEncoder = Callable[[tuple[str, ...], EncoderSettings], EncoderSettings]


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
    recipe = resolve_encoders(recipe, path)
    system = recipe.build()
    _load_weights(system, read_weights(path), path)
    for module in system.modules.values():
        module.eval().requires_grad_(False)
    return Bundle(path, recipe, system)


def resolve_encoders(recipe: R, bundle: Path) -> R:
    """Find the encoders that lie in a bundle."""
    return _map_encoders(recipe, lambda _, encoder: encoder.relative_to(bundle))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a bundle's weights, keys `<module>.<parameter>`.

    Raises:
        FileNotFoundError: there is no bundle.
    """
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a bundle: it has no {WEIGHTS}")
    return load_file(file)


def save_bundle(
    path: str | Path,
    recipe: FamilyRecipe,
    weights: Mapping[str, Tensor],
    *,
    about: str,
    training: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a bundle as a whole: it appears complete, or not at all; an older one is replaced.

    Args:
        path: folder of the bundle.
        recipe: resolved; local encoders that it names are copied into the bundle, but for those
            above `COPY_LIMIT_BYTES`, which it then names by their absolute path.
        weights: full tensors, keys `<module>.<parameter>`.
        about: text of the README.
        training: tensors that only further training needs; they get a file of their own.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        recipe = _map_encoders(recipe, partial(_copy_encoder, folder=staged))
        _save_tensors(weights, staged / WEIGHTS)
        if training:
            _save_tensors(training, staged / TRAINING_WEIGHTS)
        (staged / RECIPE).write_text(dump_recipe(recipe))
        (staged / README).write_text(about)
        staged.chmod(0o755)
        _replace(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def load_autoencoder(path: str) -> KLAutoencoder:
    """Load an autoencoder, wherever it comes from.

    Args:
        path: hub id of diffusers, a local diffusers folder, a bundle of an autoencoder family, or
            an official checkpoint of the LDM layout (a file, or `<hub id>/<file>`).

    Raises:
        FileNotFoundError: there is none.
        ValueError: the bundle or checkpoint holds something else.
    """
    if names_a_checkpoint(path):
        return load_ldm_autoencoder(path)
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


def load_decoder(bundle: Bundle) -> KLAutoencoder:
    """Give the bundle's own autoencoder, or load the one whose latents it learned on."""
    own = bundle.system.modules.get("autoencoder")
    return own if isinstance(own, KLAutoencoder) else load_latent_decoder(bundle.recipe)


def load_latent_decoder(recipe: FamilyRecipe) -> KLAutoencoder:
    """Load the autoencoder of a latent family, normalizing as its training did."""
    settings = recipe.autoencoder
    if settings is None:
        raise ValueError(f"family {recipe.family} learns on pixels; it has no autoencoder")
    autoencoder = load_autoencoder(settings.path)
    if settings.mean is not None and settings.std is not None:
        autoencoder.set_statistics(*settings.statistics(len(settings.mean)))
    autoencoder.save_memory(sliced=settings.sliced, tile=settings.tile)
    return autoencoder


def _map_encoders(settings: S, change: ChangeEncoder, *, keys: tuple[str, ...] = ()) -> S:
    """Change all encoders that settings hold, at any depth; `change` is told their keys."""
    changed: dict[str, Settings] = {}
    for key, value in settings:
        if isinstance(value, EncoderSettings):
            changed[key] = change((*keys, key), value)
        elif isinstance(value, Settings):
            changed[key] = _map_encoders(value, change, keys=(*keys, key))
    return settings.model_copy(update=changed)


def _copy_encoder(keys: tuple[str, ...], encoder: EncoderSettings, folder: Path) -> EncoderSettings:
    """Copy a local folder, bundle or checkpoint into a folder, and name it there."""
    path = Path(encoder.path)
    if not path.exists():
        return encoder
    if _count_bytes(path) > COPY_LIMIT_BYTES:
        return encoder.model_copy(update={"path": str(path.absolute())})
    name = "_".join(keys) + ("" if path.is_dir() else path.suffix)
    if path.is_dir():
        shutil.copytree(path, folder / name)
    else:
        shutil.copy2(path, folder / name)
    return encoder.model_copy(update={"path": name})


def _count_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _load_weights(system: System, weights: Mapping[str, Tensor], path: Path) -> None:
    names = system.ema_modules or tuple(system.modules)
    modules = nn.ModuleDict({name: system.modules[name] for name in names})
    load_strictly(modules, weights, source=str(path / WEIGHTS))


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Copies where tensors share their memory, which safetensors does not take.
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, path)


def _replace(staged: Path, path: Path) -> None:
    if not path.exists():
        staged.rename(path)
        return
    # A folder can't be renamed over another: the old one steps aside for the moment in between.
    old = path.with_name(f".{path.name}-old-{os.getpid()}")
    path.rename(old)
    staged.rename(path)
    shutil.rmtree(old, ignore_errors=True)
