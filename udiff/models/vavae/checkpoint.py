"""Official checkpoints of VA-VAE: an autoencoder's arguments, and weights in and out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from udiff.autoencoders.ldm import LDMAutoencoder
from udiff.autoencoders.ldm_checkpoint import infer_architecture
from udiff.models.vavae.official_config import network_keys, recipe_keys_from_official
from udiff.models.vavae.recipe import Recipe
from udiff.models.vavae.settings import NetworkSettings
from udiff.weights import TRAINING, WeightsError, check_weights, unwrap_weights

KEYS = {
    "encoder.": "autoencoder.model.encoder.",
    "decoder.": "autoencoder.model.decoder.",
    "quant_conv.": "autoencoder.model.quant_conv.",
    "post_quant_conv.": "autoencoder.model.post_quant_conv.",
    "linear_proj.": "projection.",
    "loss.discriminator.": "discriminator.",
    "loss.perceptual_loss.": f"{TRAINING}perceptual.",
    "foundation_model.model.": f"{TRAINING}foundation.",
}
"""Official prefix -> prefix in a bundle. What only training asks, and never changes, comes last."""
IDLE_DISCRIMINATOR = f"{TRAINING}discriminator."
"""Where a discriminator goes that no loss asks (officially `disc_factor: 0`)."""
LOGVAR = "loss.logvar"


class Converted(NamedTuple):
    """An official checkpoint in our terms."""

    recipe_keys: dict[str, Any]
    weights: dict[str, Tensor]
    """Keys as in a bundle: `autoencoder.model.<key>`, `projection.<key>`, `discriminator.<key>`;
    LPIPS and the foundation model under `training.`, where recipes can name them."""


def network_from_official(config: Mapping[str, Any]) -> LDMAutoencoder:
    """Build the autoencoder that `ddconfig` and `embed_dim` describe; others are passed over."""
    keys = network_keys(config)
    return LDMAutoencoder(NetworkSettings.model_validate(keys).architecture())


def convert_in(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None) -> Converted:
    """Read an official checkpoint, of training or of inference alone, in any wrapping.

    Discriminator and projection come along where the checkpoint has them; without them the recipe
    has no such losses.

    Args:
        checkpoint: bare weights, or a dict of them (`state_dict`, `model`).
        config: the official YAML, or the module's arguments; without it, sizes are read off the
            weights, and the losses are the released model's.

    Raises:
        WeightsError: keys are missing or unknown, or shapes differ; all of them are listed.
        ValueError: the configuration has values that nobody knows.
    """
    weights = unwrap_weights(checkpoint)
    ours = {new: tensor for key, tensor in weights.items() if (new := _rename(key, KEYS))}
    if unknown := sorted(key for key in weights if not key.startswith((LOGVAR, *KEYS))):
        raise WeightsError(f"this is no checkpoint of VA-VAE: unknown keys {unknown}")
    keys = recipe_keys_from_official(config or _infer_arguments(weights))
    if config is None:
        keys["network"] = _infer_network(weights)
    recipe_keys = _fit_losses(keys, weights)
    if "adversarial" not in recipe_keys["objective"]:
        ours = {_rename_idle(key): tensor for key, tensor in ours.items()}
    with torch.device("meta"):
        modules = nn.ModuleDict(dict(Recipe.model_validate(recipe_keys).build().modules))
    learned = {key: tensor for key, tensor in ours.items() if not key.startswith(TRAINING)}
    check_weights(modules, learned, source="the checkpoint")
    return Converted(recipe_keys, ours)


def convert_out(recipe: Recipe, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write weights of a bundle as the official training code does.

    LPIPS and the foundation model are there if the bundle was imported with them; the official code
    does without.
    """
    with torch.device("meta"):
        modules = nn.ModuleDict(dict(recipe.build().modules))
    learned = {key: tensor for key, tensor in weights.items() if not key.startswith(TRAINING)}
    check_weights(modules, learned, source="the bundle")
    back = {ours: official for official, ours in KEYS.items()}
    back[IDLE_DISCRIMINATOR] = back["discriminator."]
    official = {_rename(key, back): tensor for key, tensor in weights.items()}
    if any(key.startswith("loss.discriminator.") for key in official):
        official[LOGVAR] = torch.tensor(recipe.objective.logvar)
    return {"state_dict": official}


def _rename(key: str, prefixes: Mapping[str, str]) -> str:
    """Exchange a key's prefix; empty where it has none of them."""
    found = next((old for old in prefixes if key.startswith(old)), None)
    return prefixes[found] + key.removeprefix(found) if found else ""


def _rename_idle(key: str) -> str:
    return f"{TRAINING}{key}" if key.startswith("discriminator.") else key


def _infer_network(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    own = {key: tensor for key, tensor in weights.items() if key.startswith(tuple(KEYS)[:4])}
    architecture = infer_architecture(own)
    return {name: getattr(architecture, name) for name in NetworkSettings.model_fields}


def _infer_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Give the released model's losses (its last stage), as far as the weights speak of them."""
    model = "mae" if "foundation_model.model.pos_embed" in weights else "dinov2"
    if "foundation_model.model.blocks.0.ls1.gamma" in weights:
        model = "dinov2"
    network = _infer_network(weights)
    levels = len(network["multipliers"])
    return {
        "embed_dim": network["latent_channels"],
        "ddconfig": {
            "ch": network["width"],
            "ch_mult": network["multipliers"],
            "num_res_blocks": network["blocks_per_level"],
            "z_channels": network["hidden_channels"],
            "resolution": 2**levels,
            "attn_resolutions": [],
        },
        "use_vf": model if "linear_proj.weight" in weights else None,
        "reverse_proj": "linear_proj.bias" not in weights,
        "lossconfig": {
            "disc_start": 1,
            "kl_weight": 1e-6,
            "disc_weight": 0.5,
            "vf_weight": 0.1,
            "adaptive_vf": True,
            "distmat_margin": 0.25,
            "cos_margin": 0.5,
        },
    }


def _fit_losses(keys: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Leave out losses whose modules are missing, and take sizes from those that are there."""
    objective = dict(keys["objective"])
    projection = weights.get("linear_proj.weight")
    if projection is None:
        objective.pop("alignment", None)
    elif "alignment" in objective:
        dims = projection.shape[:2]
        feature_dim = dims[0] if objective["alignment"]["projects"] == "latent" else dims[1]
        objective["alignment"] = {**objective["alignment"], "feature_dim": feature_dim}
    first = weights.get("loss.discriminator.main.0.weight")
    if first is None:
        objective.pop("adversarial", None)
    elif "adversarial" in objective:
        objective["adversarial"] = {**objective["adversarial"], "width": first.shape[0]}
    if LOGVAR in weights and weights[LOGVAR].device.type != "meta":
        objective["logvar"] = weights[LOGVAR].item()
    return {**keys, "objective": objective}
