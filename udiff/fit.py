"""Train a resolved recipe, in one process of however many: what `jobs.train` runs on each worker.

from udiff.fit import fit
with local_run() as run:
    fit(resolve(load_recipe("ddt/debug")), folder=Path("runs/ddt"), run=run)
"""

import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from udiff.bundle import read_weights, save_bundle
from udiff.data.joined import JoinedStream, split_columns
from udiff.data.stream import Stream
from udiff.resolve import Resolved, Source
from udiff.system import PART_SEPARATOR, Batch, FamilyRecipe, System
from udiff.training.run import Run
from udiff.training.trainer import Trained, train
from udiff.weights import load_strictly, strip_prefix

BUNDLE = "bundle"
_ADAPTED = ".base_layer."
_ADAPTER = re.compile(r"\.lora_[AB]\.")
"""PEFT's names of a layer that has an adapter, and of the adapter's own layers."""


@dataclass(frozen=True)
class FitReport:
    """What a finished run is judged by."""

    bundle: str
    num_steps: int
    images_per_s: float


def fit(resolved: Resolved, *, folder: Path, run: Run) -> FitReport:
    """Train to the end of the recipe, from the newest checkpoint in `folder`; write the bundle."""
    recipe = resolved.recipe
    torch.manual_seed(recipe.train.seed)  # the same weights on every rank, however many
    system = recipe.build()
    if recipe.initialize_from is not None:
        initialize(system, recipe.initialize_from)
    stream = make_stream(resolved, system.columns)

    def batches(first_step: int) -> Generator[Batch, None, None]:
        return stream.batches(
            first_step,
            batch_size=recipe.train.batch_size,
            seed=recipe.train.seed,
            rank=run.rank,
            world_size=run.world_size,
        )

    trained = train(system, batches, recipe.train, ema=recipe.ema, folder=folder, run=run)
    if run.rank == 0:
        save_bundle(folder / BUNDLE, recipe, trained.weights, about=_about(recipe, trained))
    dist.barrier()
    return FitReport(str(folder / BUNDLE), trained.num_steps, trained.images_per_s)


def make_stream(resolved: Resolved, columns: tuple[str, ...]) -> Stream | JoinedStream:
    """Make the stream of a recipe's batches: of one cache, or of a cache per part of the batch."""
    if not any(PART_SEPARATOR in name for name in columns):
        return Stream(resolved.cache, resolved.manifest, columns, resolved.recipe.data)
    main = Source(resolved.cache, resolved.manifest, resolved.recipe.data)
    streams = {}
    for part, names in split_columns(columns).items():
        source = resolved.sources.get(part, main)
        streams[part] = Stream(source.cache, source.manifest, names, source.settings)
    return JoinedStream(streams)


def initialize(system: System, bundle: str) -> None:
    """Give a system's modules the weights that a bundle has for them; others stay as they are.

    A module may have grown by whole parts (another flow's layers, say): a part of which the bundle
    has nothing stays as it is, too.

    Raises:
        FileNotFoundError: there is no bundle.
        ValueError: it has none of the modules, a part's parameters only in parts, parameters that
            they have not, or other shapes.
    """
    weights = read_weights(bundle)
    known = {name: strip_prefix(weights, f"{name}.") for name in system.modules}
    if not any(known.values()):
        raise ValueError(
            f"initialize_from {bundle} has none of the modules {', '.join(system.modules)}"
        )
    for name, found in known.items():
        if found:
            module = system.modules[name]
            source = f"initialize_from {bundle}: {name}"
            adapted = _beside_adapters(module, found)
            load_strictly(module, _fresh_parts(module, adapted) | adapted, source=source)


def _fresh_parts(module: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a module's own tensors of the parts of which `found` has nothing."""
    known = {_part(key) for key in found}
    return {key: own for key, own in module.state_dict().items() if _part(key) not in known}


def _part(key: str) -> tuple[str, ...]:
    """Name the part of a tensor: the path to its module, up to the first place in a list."""
    return tuple(takewhile(lambda name: not name.isdecimal(), key.split(".")[:-1]))


def _beside_adapters(module: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add what PEFT puts around a module's layers to weights that were made without it."""
    own = module.state_dict()
    if not any(_ADAPTED in key for key in own) or any(_ADAPTED in key for key in found):
        return dict(found)
    adapted = {key.replace(_ADAPTED, "."): key for key in own}
    fresh = {key: tensor for key, tensor in own.items() if _ADAPTER.search(key)}
    return fresh | {adapted.get(key, key): tensor for key, tensor in found.items()}


def _about(recipe: FamilyRecipe, trained: Trained) -> str:
    parameters = sum(tensor.numel() for tensor in trained.weights.values())
    return (
        f"# {recipe.family}\n\n"
        f"{parameters:,} parameters, trained for {trained.num_steps:,} steps of "
        f"{recipe.train.batch_size} ({trained.num_steps * recipe.train.batch_size:,} samples) on "
        f"`{recipe.data.cache}`.\n\n"
        "- `weights.safetensors`: the weights (averaged where the recipe asks for it).\n"
        "- `recipe.yaml`: every key of the run, resolved.\n\n"
        "Sample from it with `python -m jobs.sample --bundle .`, serve it with "
        "`python -m jobs.serve --bundle .`.\n"
    )
