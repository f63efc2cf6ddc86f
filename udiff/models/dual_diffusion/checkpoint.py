"""Dual Diffusion's checkpoints and SD3-medium's, in; Dual Diffusion's, out.

Weights of Dual Diffusion have the same names everywhere: in a pipeline's folder
(`transformer/*.safetensors`), in consolidated checkpoints of training (`consolidated*.pth`), in our
bundles under `denoiser.`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from udiff.models.dual_diffusion.network import DualDiffusion
from udiff.weights import WeightsError, check_weights

SD3_RENAMED = {"norm_out.": "image_norm_out.", "proj_out.": "image_proj_out."}
SD3_DROPPED = ("time_text_embed.text_embedder.",)
"""Of pooled texts, which Dual Diffusion has none of: pictures are worse until it is trained on."""
LAST_CONTEXT_NORM = "norm1_context.linear."
FRESH = ("text_proj_out.", "null_image_embd")
FRESH_IN_LAST_BLOCK = ("attn.to_add_out.", "ff_context.")
"""What SD3 has nothing for."""


def network_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn official constructor arguments, or a diffusers `config.json`, into our network's.

    Raises:
        WeightsError: they describe a transformer that Dual Diffusion has none of.
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    for name, allowed in (
        ("caption_projection_dim", (dim,)),
        ("out_channels", (config["in_channels"], None)),
        ("dual_attention_layers", ((), [], None)),
        ("qk_norm", (None,)),
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
