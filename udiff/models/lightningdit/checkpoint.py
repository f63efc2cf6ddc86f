"""Official LightningDiT checkpoints: a network's constructor arguments, and weights in and out.

The network's attributes carry the official keys, so that nothing is renamed.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from udiff.models.lightningdit.network import LightningDiT
from udiff.models.lightningdit.official_config import (
    PUBLISHED_SIZES,
    architecture_keys,
    official_config,
    recipe_keys_from_official,
)
from udiff.models.lightningdit.recipe import Recipe, make_network
from udiff.models.lightningdit.settings import NetworkSettings
from udiff.settings import SquareLatentSettings
from udiff.weights import Converted, WeightsError, check_weights, strip_prefix, unwrap_weights

__all__ = ["convert_in", "convert_out", "network_from_official", "official_config"]

MODULE = "denoiser."


def network_from_official(config: Mapping[str, Any]) -> LightningDiT:
    """Build the network that official constructor arguments describe; others are passed over."""
    keys = architecture_keys(config)
    return make_network(
        NetworkSettings.model_validate(keys["network"]),
        SquareLatentSettings.model_validate(keys["latent"]),
        num_classes=keys["num_classes"],
        null_label=config.get("class_dropout_prob", 0.1) > 0,
    )


def convert_in(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None) -> Converted:
    """Read an official checkpoint: the averaged weights where it has them.

    Args:
        checkpoint: bare weights, or a dict of them (`ema`, `model`, `state_dict`), in any wrapping.
        config: the official YAML, or constructor arguments. Where there is none, the checkpoint's
            own (`config`) is taken, and without that, the network is read off the weights and the
            rest is the released model's.

    Raises:
        WeightsError: keys are missing or unknown, or shapes differ; all of them are listed.
        ValueError: the configuration has keys or values that nobody knows.
    """
    weights = unwrap_weights(checkpoint)
    config = config or checkpoint.get("config") or _infer_arguments(weights)
    recipe_keys = recipe_keys_from_official(config)
    with torch.device("meta"):
        network = Recipe.model_validate(recipe_keys).build_network()
    check_weights(network, weights, source="the checkpoint")
    return Converted(recipe_keys, {MODULE + key: tensor for key, tensor in weights.items()})


def convert_out(recipe: Recipe, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write weights of a bundle as the official training code does.

    `ema` is what official sampling reads, `model` what official training starts from. The YAML that
    goes with them is `official_config`.
    """
    own = strip_prefix(weights, MODULE)
    with torch.device("meta"):
        network = recipe.build_network()
    check_weights(network, own, source="the bundle")
    return {"model": own, "ema": dict(own)}


def _infer_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Find the constructor arguments of the network that has these weights."""
    try:
        dim, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
        num_tokens = weights["pos_embed"].shape[1]
        num_labels = len(weights["y_embedder.embedding_table.weight"])
        num_modulations = len(weights["blocks.0.adaLN_modulation.1.weight"]) // dim
        num_features = len(weights["final_layer.linear.weight"])
    except (KeyError, ValueError) as error:
        raise WeightsError(f"this is no LightningDiT checkpoint: {error}") from None
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    return {
        "in_channels": in_channels,
        "input_size": math.isqrt(num_tokens) * patch_size,
        "patch_size": patch_size,
        "hidden_size": dim,
        "depth": depth,
        "num_heads": dim // _head_dim(weights, depth, dim),
        "num_classes": num_labels - 1,
        "use_qknorm": "blocks.0.attn.q_norm.weight" in weights,
        "use_swiglu": "blocks.0.mlp.w12.weight" in weights,
        "use_rope": "feat_rope.freqs_cos" in weights,
        "use_rmsnorm": "blocks.0.norm1.weight" in weights,
        "wo_shift": num_modulations == 4,
        "learn_sigma": num_features == 2 * in_channels * patch_size**2,
    }


def _head_dim(weights: Mapping[str, Tensor], depth: int, dim: int) -> int:
    for key in ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"):
        if key in weights:
            return weights[key].shape[-1]
    for size in PUBLISHED_SIZES.values():
        if (size.depth, size.dim) == (depth, dim):
            return dim // size.num_heads
    raise WeightsError(
        f"the number of heads can't be told from {depth} blocks of width {dim}, which is no "
        "published size: give the configuration"
    )
