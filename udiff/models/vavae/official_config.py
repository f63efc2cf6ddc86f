"""Official YAML configurations of the tokenizer, and what they are as a recipe."""

from collections.abc import Mapping
from typing import Any

from udiff.models.vavae.recipe import Recipe
from udiff.models.vavae.settings import NetworkSettings

FEATURE_DIM = 1024
"""Of both published foundation models."""


def recipe_keys_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an official YAML's content, or the training module's arguments alone.

    Raises:
        ValueError: keys or values that the official code does not have.
    """
    arguments = config["model"]["params"] if "model" in config else config
    losses = arguments.get("lossconfig") or {}
    losses = losses.get("params", losses)
    batch_size = config.get("data", {}).get("params", {}).get("batch_size", 8) * 32
    lr = config.get("model", {}).get("base_learning_rate", 1e-4)
    epochs = config.get("lightning", {}).get("trainer", {}).get("max_epochs") or 50
    return {
        "family": "vavae",
        "network": network_keys(arguments),
        "objective": objective_keys(arguments, losses),
        "optimizer": {"lr": lr, "betas": [0.5, 0.9]},
        "train": {"images": epochs * 1_281_167, "batch_size": batch_size, "shard": "root"},
    }


def network_keys(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `ddconfig` and `embed_dim`; attention is placed by the configured resolution.

    Raises:
        ValueError: the network is one that the official code never built.
    """
    config = arguments["ddconfig"]
    if (config.get("in_channels", 3), config.get("out_ch", 3)) != (3, 3):
        raise ValueError(f"ddconfig.in_channels and .out_ch must be 3, got {dict(config)}")
    if not config.get("double_z", True):
        raise ValueError("ddconfig.double_z must be true: without it there is no posterior")
    levels = range(len(config["ch_mult"]))
    attended = [n for n in levels if config["resolution"] // 2**n in config["attn_resolutions"]]
    return {
        "width": config["ch"],
        "multipliers": list(config["ch_mult"]),
        "blocks_per_level": config["num_res_blocks"],
        "latent_channels": arguments["embed_dim"],
        "hidden_channels": config["z_channels"],
        "encoder_attention": attended,
        "decoder_attention": [] if arguments.get("model_type") == "marvae" else attended,
        "dropout": config.get("dropout", 0.0),
    }


def objective_keys(arguments: Mapping[str, Any], losses: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `lossconfig` and what the module says of the foundation model."""
    keys = {
        "kl_weight": losses.get("kl_weight", 1.0),
        "perceptual_weight": losses.get("perceptual_weight", 1.0),
        "reduction": "mean" if losses.get("pp_style", False) else "sum",
        "logvar": losses.get("logvar_init", 0.0),
    }
    if losses.get("disc_start") is not None and losses.get("disc_factor", 1.0):
        keys["adversarial"] = _adversarial(losses)
    if arguments.get("use_vf") is not None:
        keys["alignment"] = _alignment(arguments, losses)
    return keys


def adversarial_starts(disc_start: int) -> dict[str, int]:
    """Translate `disc_start`, which is compared with the steps of both optimizers together.

    In batch n, the autoencoder's loss sees 2 n steps behind it, the discriminator's 2 n + 1.
    """
    return {
        "generator_start": max(0, (disc_start + 1) // 2),
        "discriminator_start": max(0, disc_start // 2),
    }


def official_config(recipe: Recipe) -> dict[str, Any]:
    """Write a recipe as the official YAML's content (its `model` section).

    Raises:
        ValueError: the recipe says what the official code can't.
    """
    losses, alignment = _official_losses(recipe), recipe.objective.alignment
    params = {
        "monitor": "val/rec_loss",
        "embed_dim": recipe.network.latent_channels,
        "lossconfig": {"params": losses},
        "ddconfig": _official_network(recipe.network),
    }
    if alignment is not None:
        if alignment.model not in ("dinov2", "mae"):
            raise ValueError(f"objective.alignment.model {alignment.model} has no official name")
        params |= {
            "use_vf": alignment.model,
            "reverse_proj": alignment.projects == "latent",
            "proj_fix": not alignment.train_projection,
        }
    return {"model": {"base_learning_rate": recipe.optimizer.lr, "params": params}}


def _adversarial(losses: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "loss": losses.get("disc_loss", "hinge"),
        "weight": losses.get("disc_weight", 1.0),
        "factor": losses.get("disc_factor", 1.0),
        "num_layers": losses.get("disc_num_layers", 3),
        **adversarial_starts(losses["disc_start"]),
    }


def _alignment(arguments: Mapping[str, Any], losses: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": arguments["use_vf"],
        "feature_dim": FEATURE_DIM,
        "projects": "latent" if arguments.get("reverse_proj", False) else "feature",
        "train_projection": not arguments.get("proj_fix", False),
        "weight": losses.get("vf_weight", 100.0),
        "adaptive": losses.get("adaptive_vf", False),
        "distance_margin": losses.get("distmat_margin", 0.0),
        "cosine_margin": losses.get("cos_margin", 0.0),
        "distance_weight": losses.get("distmat_weight", 1.0),
        "cosine_weight": losses.get("cos_weight", 1.0),
    }


def _official_losses(recipe: Recipe) -> dict[str, Any]:
    objective = recipe.objective
    losses: dict[str, Any] = {
        "kl_weight": objective.kl_weight,
        "perceptual_weight": objective.perceptual_weight,
        "pp_style": objective.reduction == "mean",
        "logvar_init": objective.logvar,
        "disc_start": 0,
        "disc_factor": 0.0,
    }
    if game := objective.adversarial:
        if game.generator_start - game.discriminator_start not in (0, 1):
            raise ValueError(
                "officially the autoencoder heeds the discriminator at the step at which that "
                f"begins to learn, or one later; got generator_start {game.generator_start} and "
                f"discriminator_start {game.discriminator_start}"
            )
        losses |= {
            "disc_loss": game.loss,
            "disc_weight": game.weight,
            "disc_factor": game.factor,
            "disc_num_layers": game.num_layers,
            "disc_start": game.generator_start + game.discriminator_start,
        }
    if alignment := objective.alignment:
        losses |= {
            "vf_weight": alignment.weight,
            "adaptive_vf": alignment.adaptive,
            "distmat_margin": alignment.distance_margin,
            "cos_margin": alignment.cosine_margin,
            "distmat_weight": alignment.distance_weight,
            "cos_weight": alignment.cosine_weight,
        }
    return losses


def _official_network(network: NetworkSettings) -> dict[str, Any]:
    if network.norm_groups != 32:
        raise ValueError(f"officially network.norm_groups is 32, got {network.norm_groups}")
    if network.decoder_attention not in (network.encoder_attention, ()):
        raise ValueError("officially a decoder has the encoder's attention, or none")
    resolution = 256
    return {
        "double_z": True,
        "z_channels": network.hidden_channels or network.latent_channels,
        "resolution": resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": network.width,
        "ch_mult": list(network.multipliers),
        "num_res_blocks": network.blocks_per_level,
        "attn_resolutions": [resolution // 2**level for level in network.encoder_attention],
        "dropout": network.dropout,
    }
