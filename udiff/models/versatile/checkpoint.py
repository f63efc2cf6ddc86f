"""Official checkpoints of Versatile Diffusion and Stable Diffusion 1: recipes and weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from udiff.models.versatile.flows import FLOWS
from udiff.models.versatile.layers import Heads
from udiff.models.versatile.layouts import BRANCHES, to_current, to_first_release, to_unet
from udiff.models.versatile.network import ContextLayers, ImageLayers, TextLayers, VersatileNetwork
from udiff.models.versatile.places import infer_plan
from udiff.models.versatile.plan import Level, Plan
from udiff.models.versatile.schedule import make_schedule, official_buffers
from udiff.models.versatile.settings import NetworkSettings
from udiff.system import FamilyRecipe
from udiff.weights import Converted, WeightsError, strip_prefix, unwrap_weights

LAYOUTS = ("current", "first_release", "unet")
"""Of files that are written; `unet` is VD-DC's and Stable Diffusion's."""

_MODULE = "denoiser."
_EMA_NUMBERS = ("decay", "num_updates")


def convert_in(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None) -> Converted:
    """Turn an official checkpoint into a recipe's keys and a bundle's weights, float32.

    Args:
        checkpoint: a state dict, bare or of a training checkpoint, of any layout; what it holds
            beside the diffusers is left out.
        config: what the weights do not tell, or not for sure: `num_heads` (8) or
            `num_head_channels`, `attention_levels` (a list of booleans), `contexts` that those of
            Stable Diffusion become (["text"]), `text_autoencoder` (a bundle's path).

    Raises:
        WeightsError: it holds no such network.
    """
    given = config or {}
    found = unwrap_weights(checkpoint, ("state_dict",))
    if set(_EMA_NUMBERS) <= set(found):
        found = _read_ema(found)
    weights = to_current(found, contexts=given.get("contexts", ("text",)))
    return Converted(
        _recipe_keys(weights, given), {_MODULE + key: tensor for key, tensor in weights.items()}
    )


def convert_out(
    recipe: FamilyRecipe, weights: Mapping[str, Tensor], *, layout: str | None = None
) -> dict[str, Tensor]:
    """Turn a bundle's weights into an official state dict, schedule tables included.

    Args:
        recipe: of the bundle.
        weights: of the bundle.
        layout: one of `LAYOUTS`; left open, the current one, or a U-Net's where no text is written.

    Raises:
        WeightsError: the network does not fit the layout.
    """
    keys = recipe.model_dump()
    plan = NetworkSettings.model_validate(keys["network"]).plan
    own = strip_prefix(weights, _MODULE)
    writes_text = any(FLOWS[name].data == "text" for name in keys["flows"])
    match layout or ("current" if writes_text else "unet"):
        case "unet":
            named = to_unet(own, plan)
        case "first_release":
            named = to_first_release(own, plan)
        case _:
            named = own
    return {**official_buffers(make_schedule(keys["objective"]["betas"])), **named}


def _recipe_keys(weights: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the network; how it was trained and is sampled is as published."""
    data, contexts = (
        {key.split(".")[1] for key in weights if f".{part}_blocks." in key}
        for part in ("data", "context")
    )
    if not data or not contexts:
        raise WeightsError("the checkpoint has no data blocks, or no context blocks")
    plan = infer_plan(strip_prefix(weights, f"diffuser.{sorted(data)[0]}."))
    levels = plan.levels
    text_stem = weights.get("diffuser.text.data_blocks.0.0.weight")
    to_k = next(t for key, t in weights.items() if key.endswith("attn2.to_k.weight"))
    head_dim = given.get("num_head_channels")
    network = {
        "channels": plan.channels,
        "multipliers": [level.channels // plan.channels for level in levels],
        "num_blocks": [level.num_blocks for level in levels],
        "has_context": given.get("attention_levels") or _attention(weights, plan, contexts),
        "num_heads": None if head_dim else given.get("num_heads") or 8,
        "head_dim": head_dim,
        "context_dim": to_k.shape[1],
    }
    if text_stem is not None:
        network["text_positions"] = len(text_stem) // plan.channels
    text_autoencoder = given.get("text_autoencoder")
    return {
        "family": "versatile",
        "flows": [n for n, flow in FLOWS.items() if flow.data in data and flow.context in contexts],
        "network": network,
        "latent": {"channels": _image_channels(weights), "height": 64, "width": 64},
        "text_dim": 768 if text_stem is None else text_stem.shape[1],
        "autoencoder": {
            "path": "shi-labs/versatile-diffusion/pretrained_pth/kl-f8.pth",
            "mean": [0.0] * 4,
            "std": [1.0] * 4,
            "multiplier": 0.18215,
        },
        "clip": {"path": "openai/clip-vit-large-patch14"},
        "text_autoencoder": text_autoencoder and {"path": text_autoencoder},
        "optimizer": {"lr": 5e-5},
        "train": {"images": 6_400_000, "batch_size": 512},
    }


def _attention(weights: Mapping[str, Tensor], plan: Plan, contexts: set[str]) -> list[bool]:
    """Find the levels with contexts, by whichever modality's diffuser has all it takes."""
    merged = {
        key.split(".", 2)[2]: tensor
        for key, tensor in weights.items()
        if key.split(".")[1] in contexts or ".data_blocks." in key
    }
    own = {k: t for k, t in merged.items() if k.startswith("context_blocks.")}
    name = "image" if "diffuser.image.data_blocks.0.0.weight" in weights else "text"
    data = strip_prefix(weights, f"diffuser.{name}.")
    blocks = {k: t for k, t in data.items() if k.startswith("data_blocks.")}
    return [level.has_context for level in infer_plan(blocks | own).levels]


def _image_channels(weights: Mapping[str, Tensor]) -> int:
    stem = weights.get("diffuser.image.data_blocks.0.0.weight")
    return 4 if stem is None else stem.shape[1]


def _read_ema(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the weights of an averaged Stable Diffusion, whose keys have lost their dots."""
    settings = NetworkSettings()
    with torch.device("meta"):
        network = VersatileNetwork(
            settings.plan,
            data={"image": settings.image_layers(4)},
            contexts={"text": settings.context_layers()},
        )
    prefix = "diffusion_model."
    names = (key.removeprefix("model.") for key in to_unet(network.state_dict(), settings.plan))
    table = {prefix + name.removeprefix(prefix).replace(".", ""): name for name in names}
    kept = {key: t for key, t in checkpoint.items() if key not in _EMA_NUMBERS}
    if unknown := sorted(set(kept) - set(table)):
        raise WeightsError(f"this is no averaged Stable Diffusion 1: unknown keys {unknown}")
    return {f"model.{table[key]}": tensor for key, tensor in kept.items()}


# ---------------------------------------------------------------- official configurations


def network_from_official(config: Mapping[str, Any]) -> VersatileNetwork:
    """Build the network that official arguments describe, those left open at their defaults.

    Args:
        config: `diffuser_image` and `diffuser_text` (current), `unet_image` and `unet_text` (first
            release), or the arguments of VD-DC's single U-Net.

    Raises:
        ValueError: the two diffusers do not have the same order of blocks.
    """
    if "model_channels" in config:
        layers = _context_layers(config)
        return VersatileNetwork(
            _image_plan(config),
            data={"image": ImageLayers(config["in_channels"], config["out_channels"])},
            contexts=dict.fromkeys(BRANCHES, layers),
        )
    arguments = {
        name.partition("_")[2]: dict(entry["args"])
        for name, entry in config.items()
        if name.startswith(("diffuser_", "unet_"))
    }
    plans = [
        _text_plan(args) if "second_dim" in args or name == "text" else _image_plan(args)
        for name, args in arguments.items()
    ]
    if any(plan != plans[0] for plan in plans):
        raise ValueError(f"all diffusers must have one order of blocks, got {plans}")
    parts = {name: _parts(args) for name, args in arguments.items()}
    return VersatileNetwork(
        plans[0],
        data={n: _data_layers(n, a) for n, a in arguments.items() if "data" in parts[n]},
        contexts={n: _context_layers(a) for n, a in arguments.items() if "context" in parts[n]},
        time_owner=config.get("vd", {}).get("global_layer_ptr") or "image",
    )


def _parts(args: Mapping[str, Any]) -> Sequence[str]:
    return args.get("parts") or ("global", "data", "context")


def _data_layers(name: str, args: Mapping[str, Any]) -> ImageLayers | TextLayers:
    dropout = args.get("dropout", 0.0)
    channels_in = args.get("in_channels", args.get("input_channels"))
    channels_out = args.get("out_channels", args.get("output_channels"))
    if name == "image":
        return ImageLayers(channels_in, channels_out, dropout)
    positions: int
    [positions] = set(args.get("second_dim", (4,)))
    return TextLayers(channels_in, channels_out, positions, dropout)


def _context_layers(args: Mapping[str, Any]) -> ContextLayers:
    head_dim = args.get("num_head_channels")
    if head_dim == -1:
        head_dim = None
    heads = Heads(None if head_dim else args.get("num_heads") or 8, head_dim)
    return ContextLayers(args["context_dim"], heads, args.get("dropout", 0.0))


def _image_plan(args: Mapping[str, Any]) -> Plan:
    multipliers = args.get("channel_mult", (1, 2, 4, 8))
    if "with_attn" in args:
        return _plan(args, multipliers, args["num_noattn_blocks"], args["with_attn"])
    resolutions = args["attention_resolutions"]
    attention = [2**level in resolutions for level in range(len(multipliers))]
    return _plan(args, multipliers, args.get("num_res_blocks", 2), attention)


def _text_plan(args: Mapping[str, Any]) -> Plan:
    multipliers = args.get("channel_mult", (1, 2, 4, 8))
    attention = args.get("with_attn", (True, True, True, False))
    return _plan(args, multipliers, args.get("num_noattn_blocks", 2), attention)


def _plan(
    args: Mapping[str, Any],
    multipliers: Sequence[int],
    num_blocks: int | Sequence[int],
    attention: Iterable[bool],
) -> Plan:
    counts = [num_blocks] * len(multipliers) if isinstance(num_blocks, int) else num_blocks
    if len(counts) == 1:
        counts = list(counts) * len(multipliers)
    channels = args["model_channels"]
    levels = zip(multipliers, counts, attention, strict=True)
    return Plan(channels, tuple(Level(m * channels, n, bool(a)) for m, n, a in levels))
