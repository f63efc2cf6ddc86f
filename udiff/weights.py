"""Weights as named tensors: reading foreign files safely, renaming keys, loading strictly."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


class WeightsError(ValueError):
    """Weights that can't be used; the message names the file and the keys."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a safetensors file or a torch checkpoint; nothing but tensors and plain values is loaded.

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


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Load exactly the tensors that a module has.

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
    module.load_state_dict(weights, strict=True)
