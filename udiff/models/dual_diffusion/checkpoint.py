"""Dual Diffusion's checkpoints and SD3-medium's, in; Dual Diffusion's, out.

Weights of Dual Diffusion have the same names everywhere: in a pipeline's folder
(`transformer/*.safetensors`), in consolidated checkpoints of training (`consolidated*.pth`), in our
bundles under `denoiser.`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from udiff.encoders.t5 import read_token_row
from udiff.models.dual_diffusion.network import DualDiffusion
from udiff.models.dual_diffusion.recipe import Recipe
from udiff.weights import Converted, WeightsError, check_weights, strip_prefix, unwrap_weights

SD3_RENAMED = {"norm_out.": "image_norm_out.", "proj_out.": "image_proj_out."}
SD3_DROPPED = ("time_text_embed.text_embedder.",)
"""Of pooled texts, which Dual Diffusion has none of: pictures are worse until it is trained on."""
LAST_CONTEXT_NORM = "norm1_context.linear."
FRESH = ("text_proj_out.", "null_image_embd")
FRESH_IN_LAST_BLOCK = ("attn.to_add_out.", "ff_context.")
"""What SD3 has nothing for."""


def network_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn official constructor arguments, or a diffusers `config.json`, into our network's.

    What SD3.5 has besides (`dual_attention_layers`, `qk_norm`) is ignored, as officially; weights
    of it are refused.

    Raises:
        WeightsError: they describe a transformer that Dual Diffusion has none of.
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    for name, allowed in (
        ("caption_projection_dim", (dim,)),
        ("out_channels", (config["in_channels"], None)),
    ):
        if config.get(name, allowed[0]) not in allowed:
            raise WeightsError(f"{name} must be {allowed[0]}, got {config[name]}")
    return {
        "vocab_size": config["vocab_size"],
        "in_channels": config["in_channels"],
        "patch_size": config["patch_size"],
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "head_dim": config["attention_head_dim"],
        "text_dim": config["joint_attention_dim"],
        "base_size": config["sample_size"],
        "max_size": config["pos_embed_max_size"],
    }


def network_from_official(config: Mapping[str, Any]) -> DualDiffusion:
    """Build the network that official constructor arguments describe."""
    return DualDiffusion(**network_arguments(config))


def is_sd3(weights: Mapping[str, Tensor]) -> bool:
    """Tell a transformer of SD3 from one of Dual Diffusion."""
    return "text_proj_out.weight" not in weights and "proj_out.weight" in weights


def from_sd3(
    weights: Mapping[str, Tensor], arguments: Mapping[str, Any], *, seed: int = 0
) -> dict[str, Tensor]:
    """Make weights of Dual Diffusion from those of SD3; what SD3 lacks is fresh, a seed's.

    The last block's text stream begins as an identity: its modulation is SD3's for the attention,
    and its gates are closed.

    Raises:
        WeightsError: these are no weights of an SD3 transformer of this size.
    """
    last = f"transformer_blocks.{arguments['depth'] - 1}."
    found: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if key.startswith(SD3_DROPPED):
            continue
        prefix = next((old for old in SD3_RENAMED if key.startswith(old)), "")
        name = SD3_RENAMED.get(prefix, "") + key.removeprefix(prefix)
        is_reshaped = name.startswith(last + LAST_CONTEXT_NORM)
        found[name] = _open_modulation(tensor) if is_reshaped else tensor
    found |= _fresh(arguments, last, seed)
    with torch.device("meta"):
        check_weights(DualDiffusion(**arguments), found, source="the SD3 checkpoint")
    return found


def _open_modulation(tensor: Tensor) -> Tensor:
    """Turn (scale, shift) into (shift, scale, gate, shift, scale, gate)."""
    scale, shift = tensor.chunk(2)
    closed = torch.zeros_like(scale)
    return torch.cat([shift, scale, closed, closed, closed, closed])


def _fresh(arguments: Mapping[str, Any], last: str, seed: int) -> dict[str, Tensor]:
    """Initialize what SD3 lacks, by way of a network with one block, which is then the last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        single = DualDiffusion(**{**arguments, "depth": 1}).state_dict()
    first = "transformer_blocks.0."
    in_block = tuple(first + name for name in FRESH_IN_LAST_BLOCK)
    return {
        key.replace(first, last): tensor
        for key, tensor in single.items()
        if key.startswith((*FRESH, *in_block))
    }


# ---------------------------------------------------------------- files of weights

_VOCAB_SIZE = 32_100
MASK_ROW_KEY = "pretrained_mask_emb"
"""Key of the published configuration that names the file of the mask's row."""
_RELEASED: dict[str, Any] = {
    "family": "dual_diffusion",
    "autoencoder": {"path": "stabilityai/stable-diffusion-3-medium-diffusers/vae"},
    "text_encoder": {
        "path": "stabilityai/stable-diffusion-3-medium-diffusers/text_encoder_3",
        "pad": "end",
        "precision": "bf16",
    },
    "optimizer": {"lr": 3e-5, "weight_decay": 0.01, "warmup_steps": 2000, "clip_norm": 1.0},
    "train": {"images": 204_800_000, "batch_size": 256, "precision": "bf16"},
}
"""What no checkpoint says: that of the published models."""


def convert_in(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None) -> Converted:
    """Read the weights of Dual Diffusion, or of SD3-medium, from one file.

    Args:
        checkpoint: flat (`consolidated*.pth`, safetensors) or under `state_dict`.
        config: constructor arguments under `model` (else read off the weights), and the file of the
            mask's row under `pretrained_mask_emb`, without which there is none.

    Raises:
        WeightsError: keys are missing or unknown; there is no row of the mask.
    """
    config = config or {}
    weights = unwrap_weights(checkpoint, ("state_dict",))
    if MASK_ROW_KEY not in config:
        raise WeightsError(
            f"the checkpoint holds no row of the mask: name its file as {MASK_ROW_KEY} in --config"
        )
    official = config.get("model")
    arguments = network_arguments(official) if official else infer_arguments(weights)
    return convert_weights(weights, arguments, read_token_row(config[MASK_ROW_KEY]))


def convert_weights(
    weights: Mapping[str, Tensor], arguments: Mapping[str, Any], mask_row: Tensor
) -> Converted:
    """Bring weights and the mask's row into a bundle's terms; SD3's become Dual Diffusion's.

    Raises:
        WeightsError: these are not the weights of a network with these arguments.
    """
    if is_sd3(weights):
        weights = from_sd3(weights, arguments)
    with torch.device("meta"):
        check_weights(DualDiffusion(**arguments), weights, source="the checkpoint")
    sizes = {name: value for name, value in arguments.items() if name != "in_channels"}
    latent = {"channels": arguments["in_channels"]}
    text = {"mask_id": arguments["vocab_size"] - 1}
    keys = {**_RELEASED, "network": sizes, "latent": latent, "text": text}
    named = {f"denoiser.{key}": tensor for key, tensor in weights.items()}
    return Converted(keys, {**named, "mask_row.weight": mask_row})


def convert_out(recipe: Recipe, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write weights of a bundle as a flat checkpoint; adapters are merged into their layers.

    Raises:
        WeightsError: they are not the weights of the recipe's network.
    """
    found = merge_adapters(recipe, strip_prefix(weights, "denoiser."))
    with torch.device("meta"):
        network = recipe.model_copy(update={"lora": None}).build_network()
    check_weights(network, found, source="the bundle")
    return {key: found[key] for key in network.state_dict()}


def merge_adapters(recipe: Recipe, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add PEFT's adapters to the layers that they are around: W + alpha / rank B A."""
    if recipe.lora is None:
        return dict(weights)
    scale = recipe.lora.alpha / recipe.lora.rank
    merged: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if ".lora_" in key:
            continue
        layer, is_adapted, rest = key.partition(".base_layer.")
        if is_adapted and rest == "weight":
            a, b = (weights[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            tensor = tensor + scale * b @ a  # noqa: PLW2901
        merged[f"{layer}.{rest}" if is_adapted else key] = tensor
    return merged


def infer_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the network's sizes off its weights; heads of 64 and SD3's positions are assumed.

    Raises:
        WeightsError: these are no weights of Dual Diffusion or SD3.
    """
    try:
        dim, channels, patch, _ = weights["pos_embed.proj.weight"].shape
        text_dim = weights["context_embedder.weight"].shape[1]
        positions = weights["pos_embed.pos_embed"].shape[1]
    except KeyError as error:
        raise WeightsError(f"this is no checkpoint of Dual Diffusion: it has no {error}") from None
    head = weights.get("text_proj_out.weight")
    return {
        "vocab_size": _VOCAB_SIZE if head is None else len(head),
        "in_channels": channels,
        "patch_size": patch,
        "depth": len({k.split(".")[1] for k in weights if k.startswith("transformer_blocks.")}),
        "num_heads": dim // 64,
        "head_dim": 64,
        "text_dim": text_dim,
        "base_size": 128,
        "max_size": math.isqrt(positions),
    }
