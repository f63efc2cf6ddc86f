"""Official MDT checkpoints: flat state dicts under the keys that our networks have too."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from udiff.models.mdtv2.layers import BlockSizes
from udiff.models.mdtv2.network import MDT, MDTv2
from udiff.system import FamilyRecipe
from udiff.weights import Converted, WeightsError, check_weights, strip_prefix, unwrap_weights

_DEFAULTS: dict[str, Any] = {
    "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28,
    "num_heads": 16, "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000,
    "learn_sigma": True, "decode_layer": 4,
}  # fmt: skip
_SIZES: dict[str, dict[str, int]] = {
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
}
_BIAS = "attn.rel_pos_bias.relative_position_bias_table"
_PROBES = (
    "pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight",
    "final_layer.linear.weight", "sideblocks.0.mlp.fc1.weight", f"sideblocks.0.{_BIAS}",
)  # fmt: skip
_MODULE = "denoiser."


def network_from_official(config: Mapping[str, Any]) -> nn.Module:
    """Build the network that official arguments describe, those left open at their defaults.

    `model` may name the official class or factory: MDTv2, MDTv2_XL_2, MDT (version 1), MDT_S_2.
    """
    name, *size = config.get("model", "MDTv2").split("_")
    implied = {**_SIZES[size[0]], "patch_size": int(size[1])} if size else {}
    official = {**_DEFAULTS, **implied, **config}
    in_channels = official["in_channels"]
    version = {"MDTv2": MDTv2, "MDT": MDT}[name]
    return version(
        BlockSizes(
            dim=official["hidden_size"],
            num_heads=official["num_heads"],
            grid_size=official["input_size"] // official["patch_size"],
            mlp_ratio=float(official["mlp_ratio"]),
        ),
        depth=official["depth"],
        num_decoder_blocks=official["decode_layer"],
        patch_size=official["patch_size"],
        in_channels=in_channels,
        out_channels=2 * in_channels if official["learn_sigma"] else in_channels,
        num_labels=official["num_classes"] + (official["class_dropout_prob"] > 0),
    )


def convert_in(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None) -> Converted:
    """Turn an official checkpoint into a recipe's keys and a bundle's weights.

    Args:
        checkpoint: a state dict, flat or below `ema`, `model` or `state_dict`, whose keys may have
            the prefixes of data parallelism and compilation.
        config: official arguments. All but three follow from the weights: `decode_layer` of
            version 1 (2 where left open), `class_dropout_prob` (0.1) and `mask_ratio` (0.3).

    Raises:
        WeightsError: keys are missing or unknown, or the weights are not what `config` says.
    """
    weights = unwrap_weights(checkpoint)
    found = {**_arguments(weights), **{k: v for k, v in (config or {}).items() if v is not None}}
    with torch.device("meta"):
        network = network_from_official(found)
    check_weights(network, weights, source="checkpoint")
    return Converted(
        _recipe_keys(found), {_MODULE + key: tensor for key, tensor in weights.items()}
    )


def convert_out(recipe: FamilyRecipe, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a bundle's weights into an official state dict (flat, as the published files)."""
    return strip_prefix(weights, _MODULE)


def _arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the official arguments off the weights' shapes."""
    if missing := [key for key in _PROBES if key not in weights]:
        raise WeightsError(f"no checkpoint of MDT or MDTv2: missing keys {missing}")
    _, num_tokens, dim = weights["pos_embed"].shape
    _, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    out_channels = len(weights["final_layer.linear.weight"]) // patch_size**2
    counts = {
        name: _count(weights, name)
        for name in ("blocks", "en_inblocks", "en_outblocks", "de_blocks")
    }
    is_v1 = counts["blocks"] > 0
    return {
        "model": "MDT" if is_v1 else "MDTv2",
        "input_size": math.isqrt(num_tokens) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": dim,
        "depth": sum(counts.values()),
        "decode_layer": 2 if is_v1 else counts["de_blocks"],
        "num_heads": weights[f"sideblocks.0.{_BIAS}"].shape[1],
        "mlp_ratio": len(weights["sideblocks.0.mlp.fc1.weight"]) / dim,
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": out_channels == 2 * in_channels,
        "class_dropout_prob": 0.1,
    }


def _count(weights: Mapping[str, Tensor], name: str) -> int:
    return len({key.split(".")[1] for key in weights if key.startswith(f"{name}.")})


def _recipe_keys(official: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the network; how it was trained and is sampled is as published."""
    is_v1 = official["model"].startswith("MDT_") or official["model"] == "MDT"
    depth, decoder = official["depth"], official["decode_layer"]
    if not is_v1:
        depth = (depth - decoder) // 2 * 2 + decoder
    return {
        "family": "mdtv2",
        "network": {
            "version": 1 if is_v1 else 2,
            "dim": official["hidden_size"],
            "num_heads": official["num_heads"],
            "depth": depth,
            "num_decoder_blocks": decoder,
            "patch_size": official["patch_size"],
            "mlp_ratio": official["mlp_ratio"],
        },
        "latent": {
            "channels": official["in_channels"],
            "height": official["input_size"],
            "width": official["input_size"],
        },
        "num_classes": official["num_classes"],
        "autoencoder": {"path": "stabilityai/sd-vae-ft-ema"},
        "objective": {
            "variance": "learned" if official["learn_sigma"] else "fixed",
            "snr_cap": None if is_v1 else 5.0,
            "mask_ratio": official.get("mask_ratio", 0.3),
            "mask_ratio_width": 0.0 if is_v1 else 0.2,
            "label_dropout_prob": official["class_dropout_prob"],
        },
        "optimizer": {"lr": 3e-4} if is_v1 else {"name": "adan", "lr": 3e-4, "clip_norm": 1.0},
        "ema": {"decay": 0.9999},
        "train": {"images": 1_382_400_000, "batch_size": 256},
        "sampling": {"guidance_scale": 3.8 if official["class_dropout_prob"] else 1.0},
    }
