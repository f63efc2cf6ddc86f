"""Official configurations of DDT (LightningCLI YAML), and what they are as a recipe."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from udiff.models.ddt.network import DDT, ImprovedDiT

DDT_KINDS = {"DDT": DDT, "DiT": ImprovedDiT}
GUIDED_CHANNELS: dict[str, dict[str, Any]] = {
    "simple_guidance_fn": {},
    "c3_guidance_fn": {"guidance_channels": [0, 3]},
    "p4_guidance_fn": {"guidance_channels": [4, None]},
    "c4_guidance_fn": {"guidance_channels": [0, 4], "guidance_other_scale": 1.05},
    "c4_p05_guidance_fn": {"guidance_channels": [0, 4], "guidance_other_scale": 1.05},
    "c4_p10_guidance_fn": {"guidance_channels": [0, 4], "guidance_other_scale": 1.10},
    "c4_p15_guidance_fn": {"guidance_channels": [0, 4], "guidance_other_scale": 1.15},
    "c4_p20_guidance_fn": {"guidance_channels": [0, 4], "guidance_other_scale": 1.20},
}
SOLVERS = {"EulerSampler": "euler", "HeunSampler": "heun", "AdamLMSampler": "adams"}
STEPS = {
    "ode_step_fn": "ode",
    "sde_step_fn": "sde",
    "sde_mean_step_fn": "sde_mean",
    "sde_preserve_step_fn": "sde_preserve",
}
DIFFUSIONS = {"LinearScheduler": "linear", "ConstScheduler": "constant"}
CLOCKS = {"nop": "time", "t2snr": "snr", "t2isnr": "inverse_snr", "t2logsnr": "log_snr"}
WEIGHTS = {
    "constant": "constant",
    "inverse_sigma": "inverse_variance",
    "snr": "snr",
    "minsnr": "snr_at_least_5",
    "maxsnr": "snr_at_most_5",
}
TEACHERS = {"dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m"}
"""Timm's names of vision encoders, by those of torch hub."""
_IGNORED_ARGUMENTS = ("cls", "learn_sigma", "deep_supervision", "weight_path", "load_ema")
_NETWORK_ARGUMENTS = {
    "hidden_size": "dim",
    "num_groups": "num_heads",
    "num_blocks": "num_blocks",
    "num_encoder_blocks": "num_encoder_blocks",
    "patch_size": "patch_size",
}


class Instance(NamedTuple):
    """A class named in the YAML, and its arguments."""

    path: str
    arguments: Mapping[str, Any]

    @classmethod
    def read(cls, value: Any) -> "Instance":
        """Read `{class_path: ..., init_args: {...}}`, or a bare dotted name."""
        if isinstance(value, Mapping):
            return cls(value["class_path"], value.get("init_args") or {})
        return cls(str(value), {})

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return self.path.rpartition(".")[2]


def recipe_keys_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an official YAML's content.

    Raises:
        ValueError: something that the published recipes do not use, as the legacy trainers.
    """
    model, data = config["model"], config.get("data", {})
    denoiser = Instance.read(model["denoiser"])
    keys = architecture_keys({"cls": denoiser.name, **denoiser.arguments})
    channels, height, width = data.get("latent_shape", (4, 64, 64))
    trainer, sampler = (
        Instance.read(model[name]) for name in ("diffusion_trainer", "diffusion_sampler")
    )
    _check_null_label(model, keys["num_classes"])
    return {
        "family": "ddt",
        **keys,
        "latent": {"channels": channels, "height": height, "width": width},
        "autoencoder": _autoencoder(model),
        "objective": _with_teacher(
            objective_keys(trainer.name, trainer.arguments), trainer.arguments
        ),
        "optimizer": _optimizer(model, config.get("trainer", {})),
        "ema": {"decay": Instance.read(model["ema_tracker"]).arguments.get("decay", 0.9999)},
        "train": _train(config, data),
        "sampling": sampling_keys(sampler.path, sampler.arguments),
    }


def architecture_keys(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the network's constructor arguments; `cls` is DDT or DiT (the improved DiT).

    Raises:
        ValueError: an argument is unknown or missing, or the class.
    """
    kind = arguments.get("cls", "DDT")
    if kind not in DDT_KINDS:
        raise ValueError(f"cls must be one of {', '.join(DDT_KINDS)}, got {kind!r}")
    known = (*_NETWORK_ARGUMENTS, "in_channels", "num_classes", "latent_hw", *_IGNORED_ARGUMENTS)
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"unknown arguments of the official network: {unknown}")
    network = {
        ours: arguments[theirs]
        for theirs, ours in _NETWORK_ARGUMENTS.items()
        if theirs not in ("num_encoder_blocks", "patch_size")
    }
    encoder = arguments["num_encoder_blocks"] if kind == "DDT" else None
    return {
        "network": {
            **network,
            "num_encoder_blocks": encoder,
            "patch_size": arguments.get("patch_size", 2),
        },
        "latent": {"channels": arguments.get("in_channels", 4), "height": 32, "width": 32},
        "num_classes": arguments.get("num_classes", 1000),
    }


def objective_keys(trainer: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an official trainer: its class and arguments."""
    weight_fn = str(arguments.get("loss_weight_fn", "constant")).rpartition(".")[2]
    keys: dict[str, Any] = {
        "time": "logit_normal" if arguments.get("lognorm_t", False) else "uniform",
        "weight": _pick(WEIGHTS, weight_fn, "loss_weight_fn"),
        "label_dropout_prob": arguments.get("null_condition_p", 0.1),
    }
    layer, weight = arguments.get("align_layer", 8), arguments.get("feat_loss_weight", 0.5)
    match trainer.rpartition(" ")[2]:
        case "FlowMatchingTrainer":
            return keys
        case "REPATrainer":
            keys["alignment"] = {
                "layer": layer,
                "weight": weight,
                "hidden_dim": arguments.get("proj_hidden_dim", 256),
                "feature_dim": arguments.get("proj_encoder_dim", 256),
            }
        case "COSTrainer":
            keys["direction"] = {"weight": 1.0}
        case "DisperseTrainer":
            temperature = arguments.get("temperature", 1.0)
            keys["dispersive"] = {"layer": layer, "weight": weight, "temperature": temperature}
            keys["time_shift"] = arguments.get("timeshift", 1.0)
        case other:
            raise ValueError(
                f"diffusion_trainer {other} is not one that a published recipe uses: "
                "FlowMatchingTrainer, REPATrainer, COSTrainer or DisperseTrainer"
            )
    return keys


def sampling_keys(sampler: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an official sampler: its class with the module that it is in, and arguments."""
    solver = sampler.replace(" ", ".").rpartition(".")[2]
    step, last = (arguments.get(name) or "ode_step_fn" for name in ("step_fn", "last_step_fn"))
    guidance_fn = str(arguments.get("guidance_fn", "simple_guidance_fn")).rpartition(".")[2]
    scheduler = Instance.read(arguments.get("w_scheduler") or "LinearScheduler")
    clock = str(arguments.get("lms_transform_fn", "nop")).rpartition(".")[2]
    every = arguments.get("state_refresh_rate", 1)
    low, high = (
        arguments.get(f"guidance_interval_{end}", default)
        for end, default in (("min", 0.0), ("max", 1.0))
    )
    # The plain flow samplers, but for the multistep one, know no interval: not even 0 is left out.
    has_interval = solver == "AdamLMSampler" or "stateful" in sampler or "sharing" in sampler
    return {
        "solver": _pick(SOLVERS, solver, "diffusion_sampler"),
        "num_steps": arguments.get("num_steps", 250),
        "shift": arguments.get("timeshift", 1.0),
        "last_step": arguments.get("last_step"),
        "step": _pick(STEPS, str(step).rpartition(".")[2], "step_fn"),
        "last": _pick(STEPS, str(last).rpartition(".")[2], "last_step_fn"),
        "diffusion": _pick(DIFFUSIONS, scheduler.name, "w_scheduler"),
        "order": arguments.get("order", 2),
        "clock": _pick(CLOCKS, clock, "lms_transform_fn"),
        "is_exact": arguments.get("exact_henu", False),
        "guidance_scale": arguments.get("guidance", 1.0),
        "guidance_interval": [low, high] if has_interval else None,
        **_pick(GUIDED_CHANNELS, guidance_fn, "guidance_fn"),
        "reuse": {"every": every, "choice": "dynamic" if "sharing" in sampler else "fixed"}
        if every > 1
        else None,
    }


def _with_teacher(objective: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    path = str(arguments.get("encoder_weight_path")).rpartition("/")[2]
    if "alignment" not in objective or path not in TEACHERS:
        return objective  # features come from the cache
    return {**objective, "alignment": {**objective["alignment"], "teacher": TEACHERS[path]}}


def _check_null_label(model: Mapping[str, Any], num_classes: int) -> None:
    conditioner = Instance.read(model.get("conditioner", "LabelConditioner"))
    null_label = conditioner.arguments.get("null_class", num_classes)
    if null_label != num_classes:
        raise ValueError(
            f"model.conditioner: null_class must be the number of classes {num_classes}, got "
            f"{null_label}"
        )


def _autoencoder(model: Mapping[str, Any]) -> dict[str, Any]:
    vae = Instance.read(model["vae"])
    if vae.name != "LatentVAE":
        raise ValueError(f"model.vae must be LatentVAE, got {vae.name}: recipes train on latents")
    path = vae.arguments.get("weight_path") or "stabilityai/sd-vae-ft-ema"
    return {"path": path, "normalization": "scale"}


def _optimizer(model: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    optimizer = Instance.read(model["optimizer"])
    if optimizer.name != "AdamW":
        raise ValueError(f"model.optimizer must be AdamW, got {optimizer.path}")
    arguments = optimizer.arguments
    return {
        "lr": arguments.get("lr", 1e-3),
        "betas": list(arguments.get("betas", (0.9, 0.999))),
        "eps": arguments.get("eps", 1e-8),
        "weight_decay": arguments.get("weight_decay", 0.01),  # torch's own default
        "clip_norm": trainer.get("gradient_clip_val"),
    }


def _train(config: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    trainer = config.get("trainer", {})
    devices = trainer.get("devices", "auto")
    batch_size = 256  # the paper's, where the number of devices is left to the machine
    if isinstance(devices, int):
        batch_size = data.get("train_batch_size", 64) * devices * trainer.get("num_nodes", 1)
    accumulate = trainer.get("accumulate_grad_batches") or 1
    seed = config.get("seed_everything", 0)
    return {
        "images": trainer.get("max_steps", 4_000_000) * batch_size * accumulate,
        "batch_size": batch_size * accumulate,
        "accumulate": accumulate,
        "precision": "bf16" if "bf16" in str(trainer.get("precision", "bf16-mixed")) else "fp32",
        "seed": 0 if isinstance(seed, bool) else seed,
        "log_every": trainer.get("log_every_n_steps", 50),
    }


def _pick(table: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise ValueError(f"{key} must be one of {', '.join(table)}; got {name}")
    return table[name]
