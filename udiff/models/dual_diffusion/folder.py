"""Folders of diffusers: a released Dual Diffusion's, in and out; an SD3-medium's, in.

`transformer/` (one safetensors file or several with an index), `vae/`, `text_encoder/` and
`tokenizer/` (`text_encoder_3/` and `tokenizer_3/` in SD3), `scheduler/`, `model_index.json`.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from udiff.autoencoders.kl import load_diffusers_autoencoder
from udiff.encoders.t5 import load_t5, read_token_row
from udiff.models.dual_diffusion.checkpoint import (
    MASK_ROW_KEY,
    convert_out,
    convert_weights,
    network_arguments,
)
from udiff.models.dual_diffusion.recipe import Recipe
from udiff.weights import Converted, WeightsError

_TEXT_ENCODERS = ("text_encoder_3", "text_encoder")
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_ROW_TABLE = "shared.weight"
_SD3_VOCABULARY = 32_100
_PIPELINE = {
    "_class_name": "DualDiffSD3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["sd3_modules.sd3_model", "SD3JointModelFlexible"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def convert_folder(folder: Path, config: Mapping[str, Any] | None = None) -> Converted:
    """Read a pipeline's folder; its autoencoder and text encoder stay where they are.

    Args:
        folder: of Dual Diffusion or of SD3-medium.
        config: may name the file of the mask's row (`pretrained_mask_emb`), which otherwise is the
            text encoder's own.

    Raises:
        FileNotFoundError: a part is missing.
        WeightsError: the transformer is another one.
    """
    about = json.loads((folder / "transformer" / "config.json").read_text())
    arguments = network_arguments({"vocab_size": _SD3_VOCABULARY, **about})
    row = _mask_row(folder, config or {}, row=arguments["vocab_size"] - 1)
    converted = convert_weights(_read_tensors(folder / "transformer"), arguments, row)
    paths = {"autoencoder": {"path": str(folder / "vae")}}
    text_encoder = {**converted.recipe_keys["text_encoder"], "path": str(folder)}
    keys = {**converted.recipe_keys, **paths, "text_encoder": text_encoder}
    return converted._replace(recipe_keys=keys)


def write_folder(recipe: Recipe, weights: Mapping[str, Tensor], out: Path) -> None:
    """Write a bundle as a released pipeline's folder, the mask's row in its text encoder.

    Raises:
        FileNotFoundError: the recipe's autoencoder or text encoder can't be reached.
        WeightsError: these are not the weights of the recipe's network, or its autoencoder is not
            one of diffusers.
    """
    transformer = out / "transformer"
    transformer.mkdir(parents=True)
    tensors = {key: t.contiguous() for key, t in convert_out(recipe, weights).items()}
    save_file(tensors, transformer / _WEIGHTS, metadata={"format": "pt"})
    _write_json(transformer / "config.json", official_config(recipe))
    _write_autoencoder(recipe.autoencoder.path, out / "vae")
    encoder = load_t5(recipe.text_encoder.model_copy(update={"precision": "stored"}))
    table = encoder.model.get_input_embeddings().weight
    table[recipe.text.mask_id] = weights["mask_row.weight"].to(table.dtype)
    encoder.model.save_pretrained(out / "text_encoder")
    encoder.tokenizer.save_pretrained(out / "tokenizer")
    shift = recipe.sampling.image.shift
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)  # which has no types
    scheduler.save_pretrained(out / "scheduler")
    _write_json(
        out / "model_index.json", {**_PIPELINE, "_diffusers_version": diffusers.__version__}
    )


def official_config(recipe: Recipe) -> dict[str, Any]:
    """Say the network's sizes in the official terms."""
    network = recipe.network
    dim = network.num_heads * network.head_dim
    return {
        "_class_name": "SD3JointModelFlexible",
        "_diffusers_version": diffusers.__version__,
        "attention_head_dim": network.head_dim,
        "caption_projection_dim": dim,
        "dual_attention_layers": [],
        "in_channels": recipe.latent.channels,
        "joint_attention_dim": network.text_dim,
        "num_attention_heads": network.num_heads,
        "num_layers": network.depth,
        "out_channels": recipe.latent.channels,
        "patch_size": network.patch_size,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": network.max_size,
        "qk_norm": None,
        "sample_size": network.base_size,
        "vocab_size": network.vocab_size,
    }


def _write_autoencoder(path: str, out: Path) -> None:
    if Path(path).is_dir():
        if not (Path(path) / "config.json").exists():
            raise WeightsError(
                f"autoencoder.path {path} is no folder of diffusers, which a released folder holds:"
                " name one, or write to a .safetensors file, which has the transformer alone"
            )
        shutil.copytree(path, out)
        return
    load_diffusers_autoencoder(path).model.save_pretrained(out)


def _mask_row(folder: Path, config: Mapping[str, Any], *, row: int) -> Tensor:
    if MASK_ROW_KEY in config:
        return read_token_row(config[MASK_ROW_KEY])
    for name in _TEXT_ENCODERS:
        for file in sorted((folder / name).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                if _ROW_TABLE in tensors.keys():  # noqa: SIM118 (the file is no mapping)
                    return tensors.get_slice(_ROW_TABLE)[row].float()
    raise WeightsError(
        f"{folder} has no text encoder with the mask's row: name its file as {MASK_ROW_KEY} in "
        "--config"
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors weights")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return tensors


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
