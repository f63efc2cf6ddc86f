"""Official DDT checkpoints (Lightning), in and out; our keys are theirs but for prefixes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from udiff.diffusion.alignment import Projector
from udiff.models.ddt.network import DDT, ImprovedDiT
from udiff.models.ddt.official_config import architecture_keys, recipe_keys_from_official
from udiff.models.ddt.official_writer import official_config
from udiff.models.ddt.recipe import Recipe
from udiff.weights import (
    TRAINING,
    Converted,
    WeightsError,
    check_weights,
    strip_prefix,
    unwrap_weights,
)

__all__ = ["convert_in", "convert_out", "network_from_official", "official_config"]

EMA, RAW, PROJECTOR = "ema_denoiser.", "denoiser.", "diffusion_trainer.proj.0."
OPTIMIZER = f"{TRAINING}optimizer."
_OURS = {RAW: f"{TRAINING}denoiser.", PROJECTOR: f"{TRAINING}projector."}
"""Under what a bundle keeps the weights that are trained on, by their official prefix."""
_ENCODER_BLOCKS = {(1152, 28): 22, (1024, 24): 20, (768, 12): 8}
"""Of the published sizes (dim, blocks): weights do not show where the encoder ends."""
_RELEASED: dict[str, Any] = {
    "family": "ddt",
    "autoencoder": {"path": "stabilityai/sd-vae-ft-ema", "normalization": "scale"},
    "optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]},
    "ema": {"decay": 0.9999},
    "train": {"images": 102_400_000, "batch_size": 256, "precision": "bf16"},
    "sampling": {
        "num_steps": 250,
        "guidance_scale": 2.0,
        "guidance_interval": [0.3, 1.0],
        "last_step": 0.04,
    },
}
"""What is not said where there is no configuration: that of the released 256 model."""


def network_from_official(config: Mapping[str, Any]) -> nn.Module:
    """Build the network that official constructor arguments (and `cls`, DDT or DiT) describe."""
    return _build(architecture_keys(config))


def convert_in(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None) -> Converted:
    """Read an official checkpoint: the averaged weights are sampled from, where it has them.

    Whatever else it holds (the weights that are trained on, the REPA projector, the optimizer's
    state) comes along under `training.`.

    Args:
        checkpoint: of Lightning, compiled or not, or the bare weights of a network.
        config: the official YAML's content, or constructor arguments. Where there is none, all but
            the length of the encoder follows from the weights; that is known of published sizes.

    Raises:
        WeightsError: keys are missing or unknown, or are not those of `config`'s network.
    """
    state = unwrap_weights(checkpoint, ("state_dict",))
    parts = {prefix: strip_prefix(state, prefix) for prefix in (EMA, RAW, PROJECTOR)}
    unknown = sorted(key for key in state if not key.startswith(tuple(parts)))
    if not parts[EMA] and not parts[RAW]:
        parts[EMA], unknown = state, []
    if unknown:
        raise WeightsError(f"the checkpoint has unknown keys {unknown}")
    weights = parts[EMA] or parts.pop(RAW)
    keys = _recipe_keys(weights, config)
    with torch.device("meta"):
        network = _build(keys)
    check_weights(network, weights, source="the checkpoint")
    converted = {f"denoiser.{key}": tensor for key, tensor in weights.items()}
    trained: dict[str, nn.Module] = {}
    if parts[PROJECTOR]:
        trained["projector"] = _projector(parts[PROJECTOR])
    trained["denoiser"] = network
    for prefix, name in _OURS.items():
        if part := parts.get(prefix):
            check_weights(trained[name.split(".")[1]], part, source=f"{prefix}* of the checkpoint")
            converted |= {name + key: tensor for key, tensor in part.items()}
    return Converted(keys, converted | _optimizer_in(checkpoint, trained))


def convert_out(recipe: Recipe, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write weights of a bundle as an official checkpoint.

    Where the bundle has none to train on, those that are sampled from stand in for them.

    Raises:
        WeightsError: they are not the weights of the recipe's network.
    """
    averaged = strip_prefix(weights, "denoiser.")
    with torch.device("meta"):
        network = recipe.build_network()
    check_weights(network, averaged, source="the bundle")
    raw = strip_prefix(weights, _OURS[RAW]) or averaged
    check_weights(network, raw, source=f"{_OURS[RAW]}* of the bundle")
    projector = strip_prefix(weights, _OURS[PROJECTOR])
    trained = {"projector": _projector(projector)} if projector else {}
    states = _optimizer_out(recipe, weights, {**trained, "denoiser": network})
    return {
        "epoch": 0,
        "global_step": int(states[0]["state"][0]["step"]) if states else 0,
        "pytorch-lightning_version": "2.5.0.post0",
        "state_dict": {
            **{RAW + key: raw[key] for key in network.state_dict()},
            **{EMA + key: averaged[key] for key in network.state_dict()},
            **{PROJECTOR + key: projector[key] for key in _keys_of(trained.get("projector"))},
        },
        "loops": {},
        "optimizer_states": states,
        "lr_schedulers": [],
    }


def _build(keys: Mapping[str, Any]) -> DDT | ImprovedDiT:
    sizes = dict(keys["network"])
    encoder = sizes.pop("num_encoder_blocks")
    shared = {"in_channels": keys["latent"]["channels"], "num_classes": keys["num_classes"]}
    if encoder is None:
        return ImprovedDiT(**shared, **sizes)
    return DDT(**shared, **sizes, num_encoder_blocks=encoder)


def _recipe_keys(weights: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, Any]:
    if config and "model" in config:
        return recipe_keys_from_official(config)
    return {**_RELEASED, **architecture_keys(config or _infer_arguments(weights))}


def _infer_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Find the constructor arguments of the network that has these weights."""
    try:
        dim, features = weights["x_embedder.proj.weight"].shape
        head_dim = len(weights["blocks.0.attn.q_norm.weight"])
        num_labels = len(weights["y_embedder.embedding_table.weight"])
    except KeyError as error:
        raise WeightsError(f"this is no DDT checkpoint: it has no {error}") from None
    num_blocks = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    arguments = {
        "cls": "DDT" if "s_embedder.proj.weight" in weights else "DiT",
        "in_channels": features // 4,  # patches of 2 x 2, as in every published model
        "patch_size": 2,
        "hidden_size": dim,
        "num_groups": dim // head_dim,
        "num_blocks": num_blocks,
        "num_classes": num_labels - 1,
    }
    if arguments["cls"] == "DiT":
        return arguments
    if (dim, num_blocks) not in _ENCODER_BLOCKS:
        raise WeightsError(
            f"where the encoder ends can't be told from {num_blocks} blocks of width {dim}, which "
            "is no published size: give the configuration"
        )
    return {**arguments, "num_encoder_blocks": _ENCODER_BLOCKS[dim, num_blocks]}


def _projector(weights: Mapping[str, Tensor]) -> Projector:
    try:
        hidden_dim, dim = weights["0.weight"].shape
        feature_dim = len(weights["4.weight"])
    except KeyError as error:
        raise WeightsError(f"{PROJECTOR}* of the checkpoint has no {error}") from None
    with torch.device("meta"):
        return Projector(dim, hidden_dim=hidden_dim, feature_dim=feature_dim)


def _parameter_names(trained: Mapping[str, nn.Module]) -> list[str]:
    """List what the official optimizer numbers: the projector's parameters, then the network's."""
    return [f"{name}.{key}" for name, m in trained.items() for key, _ in m.named_parameters()]


def _keys_of(module: nn.Module | None) -> list[str]:
    return list(module.state_dict()) if module else []


def _optimizer_in(
    checkpoint: Mapping[str, Any], trained: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    states = checkpoint.get("optimizer_states")
    if not states:
        return {}
    names, state = _parameter_names(trained), states[0]["state"]
    if set(state) != set(range(len(names))):
        raise WeightsError(
            f"the optimizer has the state of {len(state)} parameters, the network has {len(names)}"
        )
    return {
        f"{OPTIMIZER}{names[index]}.{key}": torch.as_tensor(value)
        for index, moments in state.items()
        for key, value in moments.items()
    }


def _optimizer_out(
    recipe: Recipe, weights: Mapping[str, Tensor], trained: Mapping[str, nn.Module]
) -> list[dict[str, Any]]:
    moments = strip_prefix(weights, OPTIMIZER)
    if not moments:
        return []
    names = _parameter_names(trained)
    settings = recipe.optimizer
    group = {
        "lr": settings.lr,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "params": list(range(len(names))),
    }
    state = {index: strip_prefix(moments, f"{name}.") for index, name in enumerate(names)}
    return [{"state": state, "param_groups": [group]}]
