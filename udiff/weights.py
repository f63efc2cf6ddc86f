"""Weights as named tensors: reading foreign files safely, renaming keys, loading strictly."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

TRAINING = "training."
"""Prefix of what only further training needs: in a bundle, a file of its own."""


class Converted(NamedTuple):
    """An official checkpoint in our terms."""

    recipe_keys: dict[str, Any]
    weights: dict[str, Tensor]
    """Keys as in a bundle, `denoiser.<key>`; what only further training needs under `training.`."""


class WeightsError(ValueError):
    """Weights that can't be used; the message names the file and the keys."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a safetensors file or a torch checkpoint; only tensors and plain values are loaded.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged, or holds pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(
            f"{path} holds pickled objects other than tensors, which are never loaded: {reason}"
        ) from None
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{path} is no checkpoint, or a damaged one: {error}") from None


def strip_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the tensors whose key starts with `prefix`, under the rest of their key."""
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in weights.items()
        if key.startswith(prefix)
    }


def unwrap_weights(
    checkpoint: Mapping[str, Any], containers: tuple[str, ...] = ("ema", "model", "state_dict")
) -> dict[str, Tensor]:
    """Find the weights in a checkpoint, under the names that the network itself gives them.

    They are what the first of `containers` holds that is there, or else the checkpoint itself;
    `module.` (of DDP) and `_orig_mod.` (of torch.compile) are taken out of the keys.

    Raises:
        WeightsError: something among the weights is not a tensor.
    """
    found = next((checkpoint[name] for name in containers if name in checkpoint), checkpoint)
    foreign = sorted(key for key, value in found.items() if not isinstance(value, Tensor))
    if foreign:
        raise WeightsError(
            f"the checkpoint holds no weights in {', '.join(containers)}, and these of its entries "
            f"are not tensors: {foreign}"
        )
    wrappers = ("module", "_orig_mod")
    return {
        ".".join(part for part in key.split(".") if part not in wrappers): tensor
        for key, tensor in found.items()
    }


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Load exactly the tensors that a module has; raises as `check_weights` does."""
    check_weights(module, weights, source=source)
    module.load_state_dict(weights, strict=True)


def check_weights(module: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Check that weights are exactly the tensors that a module (on any device, meta too) has.

    Raises:
        WeightsError: keys are missing or unknown, or shapes differ; all of them are listed.
    """
    wanted = module.state_dict()
    missing, unknown = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if missing or unknown:
        raise WeightsError(f"{source}: missing keys {missing}, unknown keys {unknown}")
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, wanted {tuple(wanted[key].shape)}"
        for key in wanted
        if weights[key].shape != wanted[key].shape
    ]
    if shapes:
        raise WeightsError(f"{source}: {'; '.join(shapes)}")


def hash_module(module: nn.Module, about: Mapping[str, Any]) -> str:
    """Hash a module's weights, and plain values that say what else it is."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)  # a number has no bytes to view
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
