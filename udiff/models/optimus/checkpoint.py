"""Official checkpoints of Optimus: `encoder.*` and `decoder.*`, bare (optimus-vae.pth)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from udiff.autoencoders.optimus_checkpoint import MODULE, from_official, infer_settings, to_official
from udiff.system import FamilyRecipe
from udiff.weights import Converted, strip_prefix, unwrap_weights


def convert_in(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None) -> Converted:
    """Turn an official checkpoint into a recipe's keys and a bundle's weights, float32.

    Args:
        checkpoint: a state dict, its keys below `vae.text.` or `optimus.` or at the top.
        config: `tokenizers`, the folder of vocabularies (default: runs/optimus/tokenizers).

    Raises:
        WeightsError: it holds something else.
    """
    weights = unwrap_weights(checkpoint)
    official = strip_prefix(weights, "vae.text.") or strip_prefix(weights, MODULE) or weights
    keys = {
        "family": "optimus",
        "network": infer_settings(official).model_dump(),
        "tokenizers": {"path": (config or {}).get("tokenizers", "runs/optimus/tokenizers")},
        "optimizer": {"lr": 5e-5},
        "train": {"images": 1_000_000, "batch_size": 128},
    }
    return Converted(keys, {MODULE + key: t for key, t in from_official(official).items()})


def convert_out(recipe: FamilyRecipe, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a bundle's weights into an official state dict."""
    return to_official(strip_prefix(weights, MODULE))
