"""Official YAML configurations of LightningDiT, and what they are as a recipe."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from udiff.models.lightningdit.recipe import Recipe
from udiff.settings import AutoencoderSettings


class Size(NamedTuple):
    """A published size."""

    depth: int
    dim: int
    num_heads: int


PUBLISHED_SIZES = {
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
    "1p0B": Size(24, 1536, 24),
    "1p6B": Size(28, 1792, 28),
}
VAVAE = "hustvl/vavae-imagenet256-f16d32-dinov2"
SD_VAE = "stabilityai/sd-vae-ft-ema"
RELEASED: dict[str, dict[str, Any]] = {
    "data": {"latent_norm": True, "latent_multiplier": 1.0},
    "vae": {},
    "model": {},
    "train": {},
    "optimizer": {},
    "transport": {"use_cosine_loss": True, "use_lognorm": True},
    "sample": {"cfg_scale": 10.0, "cfg_interval_start": 0.1, "timestep_shift": 0.3},
}
"""What the released model of 64 epochs says, beside what is taken where nothing is said."""
_METHODS = {
    "euler": "euler",
    "heun2": "heun",
    "midpoint": "midpoint",
    "heun3": "heun3",
    "rk4": "rk4",
    "dopri5": "dopri5",
}

_KNOWN = {
    "": ("ckpt_path", "data", "vae", "model", "train", "optimizer", "transport", "sample"),
    "data": (
        "data_path", "fid_reference_file", "image_size", "num_classes", "num_workers",
        "latent_norm", "latent_multiplier", "valid_path",
    ),
    "vae": ("model_name", "downsample_ratio"),
    "model": (
        "model_type", "use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "in_chans",
        "use_checkpoint", "learn_sigma",
    ),
    "train": (
        "max_steps", "global_batch_size", "global_seed", "output_dir", "exp_name", "ckpt",
        "log_every", "ckpt_every", "weight_init", "resume", "use_checkpoint",
    ),
    "optimizer": ("lr", "beta2", "max_grad_norm"),
    "transport": (
        "path_type", "prediction", "loss_weight", "sample_eps", "train_eps", "use_cosine_loss",
        "use_lognorm",
    ),
    "sample": (
        "mode", "sampling_method", "atol", "rtol", "reverse", "likelihood", "num_sampling_steps",
        "cfg_scale", "per_proc_batch_size", "fid_num", "cfg_interval_start", "timestep_shift",
    ),
}  # fmt: skip


def recipe_keys_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an official YAML's content, or constructor arguments of the network alone.

    Sections that are absent are as the released models': an absent key of a section that is there
    is what the official scripts then take.

    Raises:
        ValueError: keys or values that the official code does not have.
    """
    if "hidden_size" in config:
        return _recipe_keys(config, RELEASED)
    _check_known(config)
    sections = {**RELEASED, **{name: keys for name, keys in config.items() if keys}}
    return _recipe_keys(_arguments_from_sections(sections), sections)


def architecture_keys(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the network's constructor arguments; others are passed over."""
    side = arguments["input_size"]
    return {
        "network": {
            "dim": arguments["hidden_size"],
            "num_heads": arguments["num_heads"],
            "depth": arguments["depth"],
            "patch_size": arguments["patch_size"],
            "mlp_ratio": arguments.get("mlp_ratio", 4.0),
            "norm": "rms" if arguments.get("use_rmsnorm", False) else "layer",
            "qk_norm": arguments.get("use_qknorm", False),
            "feed_forward": "swiglu" if arguments.get("use_swiglu", False) else "gelu",
            "rotary": arguments.get("use_rope", False),
            "shift": not arguments.get("wo_shift", False),
            "learn_sigma": arguments.get("learn_sigma", False),
        },
        "latent": {"channels": arguments["in_channels"], "height": side, "width": side},
        "num_classes": arguments.get("num_classes", 1000),
    }


def objective_keys(transport: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the `transport` section (or the arguments of the official `create_transport`)."""
    prediction = transport.get("prediction", "velocity")
    # The official code ignores the weight of a velocity's loss.
    weight = (transport.get("loss_weight") or "none") if prediction != "velocity" else "none"
    return {
        "path": transport.get("path_type", "Linear").lower(),
        "prediction": prediction,
        "weight": weight,
        "time": "logit_normal" if transport.get("use_lognorm", False) else "uniform",
        "direction": {"weight": 1.0} if transport.get("use_cosine_loss", False) else None,
        "eps": transport.get("train_eps"),
    }


def official_config(recipe: Recipe) -> dict[str, Any]:
    """Write a recipe as the official YAML's content.

    Raises:
        ValueError: the recipe says what the official code can't.
    """
    objective, sampling = recipe.objective, recipe.sampling
    config = {
        "data": {
            "image_size": recipe.latent.height * _ratio(recipe),
            "num_classes": recipe.num_classes,
            "latent_norm": not _leaves_latents_raw(recipe.autoencoder),
            "latent_multiplier": recipe.autoencoder.multiplier,
        },
        "vae": {"downsample_ratio": _ratio(recipe)},
        "model": _official_model(recipe),
        "train": {
            "max_steps": recipe.train.num_steps,
            "global_batch_size": recipe.train.batch_size,
            "global_seed": recipe.train.seed,
            "log_every": recipe.train.log_every,
            "ckpt_every": recipe.train.checkpoint_every,
        },
        "optimizer": {
            "lr": recipe.optimizer.lr,
            "beta2": recipe.optimizer.betas[1],
            "max_grad_norm": recipe.optimizer.clip_norm,
        },
        "transport": {
            "path_type": {"linear": "Linear", "gvp": "GVP", "vp": "VP"}[objective.path],
            "prediction": objective.prediction,
            "loss_weight": None if objective.weight == "none" else objective.weight,
            "sample_eps": sampling.eps,
            "train_eps": objective.eps,
            "use_cosine_loss": objective.direction is not None,
            "use_lognorm": objective.time == "logit_normal",
        },
        "sample": _official_sample(recipe),
    }
    _check_expressible(recipe, config)
    return config


def _check_known(config: Mapping[str, Any]) -> None:
    unknown = [key for key in config if key not in _KNOWN[""]]
    for section, keys in _KNOWN.items():
        if section:
            unknown += [f"{section}.{key}" for key in config.get(section) or {} if key not in keys]
    if unknown:
        raise ValueError(f"the official configuration has unknown keys: {sorted(unknown)}")


def _recipe_keys(arguments: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    train, optimizer = sections["train"], sections["optimizer"]
    batch_size = train.get("global_batch_size", 1024)
    dropout_prob = arguments.get("class_dropout_prob", 0.1)
    return {
        "family": "lightningdit",
        **architecture_keys(arguments),
        "autoencoder": _autoencoder(sections["data"], arguments["in_channels"]),
        "objective": objective_keys(sections["transport"]) | {"label_dropout_prob": dropout_prob},
        "optimizer": {
            "lr": optimizer.get("lr", 2e-4),
            "betas": [0.9, optimizer.get("beta2", 0.95)],
            "clip_norm": optimizer.get("max_grad_norm"),
        },
        "ema": {"decay": 0.9999},
        "train": {
            "images": train.get("max_steps", 80_000) * batch_size,
            "batch_size": batch_size,
            "precision": "bf16",
            "seed": train.get("global_seed", 0),
            "log_every": train.get("log_every", 100),
            "checkpoint_every": train.get("ckpt_every", 20_000),
        },
        "sampling": _sampling(sections["sample"], sections["transport"]),
    }


def _arguments_from_sections(sections: Mapping[str, Any]) -> dict[str, Any]:
    model, data = dict(sections["model"]), sections["data"]
    name, _, patch_size = model.pop("model_type", "").removeprefix("LightningDiT-").partition("/")
    if name not in PUBLISHED_SIZES or not patch_size.isdigit():
        raise ValueError(
            f"model.model_type must be LightningDiT-<size>/<patch> with a size of "
            f"{', '.join(PUBLISHED_SIZES)}; got {sections['model'].get('model_type')}"
        )
    size = PUBLISHED_SIZES[name]
    return {
        **model,
        "in_channels": model.get("in_chans", 4),
        "input_size": data.get("image_size", 256) // sections["vae"].get("downsample_ratio", 16),
        "patch_size": int(patch_size),
        "hidden_size": size.dim,
        "depth": size.depth,
        "num_heads": size.num_heads,
        "num_classes": data.get("num_classes", 1000),
    }


def _autoencoder(data: Mapping[str, Any], channels: int) -> dict[str, Any]:
    keys = {
        "path": VAVAE if channels == 32 else SD_VAE,
        "normalization": "channels",
        "multiplier": data.get("latent_multiplier", 0.18215),
    }
    if data.get("latent_norm", False):
        return keys
    return {**keys, "mean": [0.0] * channels, "std": [1.0] * channels}


def _sampling(sample: Mapping[str, Any], transport: Mapping[str, Any]) -> dict[str, Any]:
    method = sample.get("sampling_method", "euler")
    if method not in _METHODS or sample.get("mode", "ODE") != "ODE" or sample.get("reverse"):
        raise ValueError(
            f"sample must be mode ODE with a method of {', '.join(_METHODS)}, not reversed; got "
            f"{dict(sample)}"
        )
    return {
        "method": _METHODS[method],
        # Officially points in time, one more than steps.
        "num_steps": sample.get("num_sampling_steps", 250) - 1,
        "guidance_scale": sample.get("cfg_scale", 1.0),
        "guidance_interval": [sample.get("cfg_interval_start", 0.0), 1.0],
        # Officially the reciprocal, and 0 for none.
        "shift": 1 / (sample.get("timestep_shift", 0.0) or 1.0),
        "atol": sample.get("atol", 1e-6),
        "rtol": sample.get("rtol", 1e-3),
        "eps": transport.get("sample_eps"),
    }


def _ratio(recipe: Recipe) -> int:
    return 8 if recipe.autoencoder.path == SD_VAE else 16


def _leaves_latents_raw(settings: AutoencoderSettings) -> bool:
    return settings.mean is not None and not any(settings.mean) and set(settings.std or ()) == {1.0}


def _official_model(recipe: Recipe) -> dict[str, Any]:
    network = recipe.network
    size = Size(network.depth, network.dim, network.num_heads)
    names = [name for name, published in PUBLISHED_SIZES.items() if published == size]
    if not names:
        raise ValueError(f"network: {size} is not one of the published sizes {PUBLISHED_SIZES}")
    return {
        "model_type": f"LightningDiT-{names[0]}/{network.patch_size}",
        "use_qknorm": network.qk_norm,
        "use_swiglu": network.feed_forward == "swiglu",
        "use_rope": network.rotary,
        "use_rmsnorm": network.norm == "rms",
        "wo_shift": not network.shift,
        "in_chans": recipe.latent.channels,
        "learn_sigma": network.learn_sigma,
    }


def _official_sample(recipe: Recipe) -> dict[str, Any]:
    sampling = recipe.sampling
    methods = {ours: official for official, ours in _METHODS.items()}
    return {
        "mode": "ODE",
        "sampling_method": methods.get(sampling.method, "euler"),
        "num_sampling_steps": sampling.num_steps + 1,
        "cfg_scale": sampling.guidance_scale,
        "cfg_interval_start": sampling.guidance_interval[0],
        "timestep_shift": 1 / sampling.shift,
        "atol": sampling.atol,
        "rtol": sampling.rtol,
    }


def _check_expressible(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Refuse what officially would be another network or objective; sampling is but a default."""
    back = Recipe.model_validate(recipe_keys_from_official(config))
    for group in ("network", "latent", "num_classes", "objective", "optimizer"):
        ours, official = getattr(recipe, group), getattr(back, group)
        if ours != official:
            raise ValueError(
                f"{group} can't be said in an official configuration: {ours}, officially {official}"
            )
