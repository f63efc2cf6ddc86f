"""Recipes of DDT as official configurations (LightningCLI YAML): `official_config`'s other way."""

from collections.abc import Mapping
from typing import Any

from udiff.models.ddt.official_config import (
    CLOCKS,
    DIFFUSIONS,
    GUIDED_CHANNELS,
    SOLVERS,
    STEPS,
    TEACHERS,
    WEIGHTS,
    recipe_keys_from_official,
)
from udiff.models.ddt.recipe import Recipe

_FLOW, _STATEFUL = "src.diffusion.flow_matching", "src.diffusion.stateful_flow_matching"
_MODULES = {"repa": "training_repa.REPATrainer", "plain": "training.FlowMatchingTrainer"}
_MODULES |= {"cos": "training_cos.COSTrainer", "disperse": "training_disperse.DisperseTrainer"}
_CHECKED = ("network", "latent", "num_classes", "objective", "optimizer", "ema", "sampling")


def official_config(recipe: Recipe) -> dict[str, Any]:
    """Write a recipe as the official YAML's content.

    Raises:
        ValueError: the recipe says what the official code can't.
    """
    is_divided = recipe.network.num_encoder_blocks is not None
    module = _STATEFUL if is_divided else _FLOW
    config = {
        "seed_everything": recipe.train.seed,
        "trainer": _trainer(recipe),
        "model": {
            "vae": _instance(
                "src.models.vae.LatentVAE", precompute=True, weight_path=recipe.autoencoder.path
            ),
            "denoiser": _denoiser(recipe),
            "conditioner": _instance(
                "src.models.conditioner.LabelConditioner", null_class=recipe.num_classes
            ),
            "diffusion_trainer": _diffusion_trainer(recipe, module),
            "diffusion_sampler": _diffusion_sampler(recipe, module),
            "ema_tracker": _instance(
                "src.callbacks.simple_ema.SimpleEMA", decay=recipe.ema.decay if recipe.ema else 0.0
            ),
            "optimizer": _instance(
                "torch.optim.AdamW",
                lr=recipe.optimizer.lr,
                betas=list(recipe.optimizer.betas),
                eps=recipe.optimizer.eps,
                weight_decay=recipe.optimizer.weight_decay,
            ),
        },
        "data": {
            "train_dataset": f"imagenet{8 * recipe.latent.height}",
            "train_batch_size": _batch_size(recipe) // _devices(recipe),
            "latent_shape": [recipe.latent.channels, recipe.latent.height, recipe.latent.width],
        },
    }
    _check_expressible(recipe, config)
    return config


def _instance(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


def _name(table: Mapping[str, Any], value: Any) -> str:
    """Find the first official name of a value; '' where it has none, which reading refuses."""
    return next((name for name, ours in table.items() if ours == value), "")


def _batch_size(recipe: Recipe) -> int:
    return recipe.train.batch_size // recipe.train.accumulate


def _devices(recipe: Recipe) -> int:
    return 1 if _batch_size(recipe) % 8 else 8


def _trainer(recipe: Recipe) -> dict[str, Any]:
    return {
        "precision": "bf16-mixed" if recipe.train.precision == "bf16" else "32-true",
        "max_steps": recipe.train.num_steps,
        "devices": _devices(recipe),
        "num_nodes": 1,
        "accumulate_grad_batches": recipe.train.accumulate,
        "gradient_clip_val": recipe.optimizer.clip_norm,
        "log_every_n_steps": recipe.train.log_every,
    }


def _denoiser(recipe: Recipe) -> dict[str, Any]:
    network = recipe.network
    arguments = {
        "in_channels": recipe.latent.channels,
        "patch_size": network.patch_size,
        "num_groups": network.num_heads,
        "hidden_size": network.dim,
        "num_blocks": network.num_blocks,
        "num_classes": recipe.num_classes,
    }
    if network.num_encoder_blocks is None:
        return _instance("src.models.denoiser.improved_dit.DiT", **arguments)
    arguments["num_encoder_blocks"] = network.num_encoder_blocks
    return _instance("src.models.denoiser.decoupled_improved_dit.DDT", **arguments)


def _diffusion_trainer(recipe: Recipe, module: str) -> dict[str, Any]:
    objective = recipe.objective
    arguments: dict[str, Any] = {
        "lognorm_t": objective.time == "logit_normal",
        "loss_weight_fn": f"{module}.training.{_name(WEIGHTS, objective.weight)}",
        "null_condition_p": objective.label_dropout_prob,
        "scheduler": f"{module}.scheduling.LinearScheduler",
    }
    kind = "plain"
    if alignment := objective.alignment:
        kind = "repa"
        arguments |= {
            "align_layer": alignment.layer,
            "feat_loss_weight": alignment.weight,
            "encoder_weight_path": _name(TEACHERS, alignment.teacher) or None,
            "proj_denoiser_dim": recipe.network.dim,
            "proj_hidden_dim": alignment.hidden_dim or recipe.network.dim,
            "proj_encoder_dim": alignment.feature_dim,
        }
    elif dispersive := objective.dispersive:
        kind = "disperse"
        arguments |= {
            "align_layer": dispersive.layer,
            "feat_loss_weight": dispersive.weight,
            "temperature": dispersive.temperature,
            "timeshift": objective.time_shift,
        }
    elif objective.direction:
        kind = "cos"
    return _instance(f"{module}.{_MODULES[kind]}", **arguments)


def _diffusion_sampler(recipe: Recipe, module: str) -> dict[str, Any]:
    sampling = recipe.sampling
    guided = {
        "guidance_channels": list(sampling.guidance_channels),
        "guidance_other_scale": sampling.guidance_other_scale,
    }
    plain = {"guidance_channels": [0, None], "guidance_other_scale": 1.0}
    functions = {name: {**plain, **keys} for name, keys in GUIDED_CHANNELS.items()}
    low, high = sampling.guidance_interval or (0.0, 1.0)
    reuse = sampling.reuse
    is_dynamic = reuse is not None and reuse.choice == "dynamic"
    file = "sharing_sampling" if is_dynamic else "sampling"
    return _instance(
        f"{module}.{file}.{_name(SOLVERS, sampling.solver)}",
        num_steps=sampling.num_steps,
        guidance=sampling.guidance_scale,
        guidance_fn=f"src.diffusion.base.guidance.{_name(functions, guided)}",
        guidance_interval_min=low,
        guidance_interval_max=high,
        timeshift=sampling.shift,
        last_step=sampling.last_step,
        step_fn=f"{module}.sampling.{_name(STEPS, sampling.step)}",
        last_step_fn=f"{module}.sampling.{_name(STEPS, sampling.last)}",
        scheduler=f"{module}.scheduling.LinearScheduler",
        w_scheduler=f"{module}.scheduling.{_name(DIFFUSIONS, sampling.diffusion)}",
        order=sampling.order,
        lms_transform_fn=_name(CLOCKS, sampling.clock),
        exact_henu=sampling.is_exact,
        state_refresh_rate=reuse.every if reuse else 1,
    )


def _check_expressible(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Refuse what officially would be another run."""
    back = Recipe.model_validate(recipe_keys_from_official(config))
    own = recipe
    if (alignment := recipe.objective.alignment) and alignment.hidden_dim is None:
        said = alignment.model_copy(update={"hidden_dim": recipe.network.dim})
        objective = recipe.objective.model_copy(update={"alignment": said})
        own = recipe.model_copy(update={"objective": objective})
    for group in _CHECKED:
        ours, official = getattr(own, group), getattr(back, group)
        if ours != official:
            raise ValueError(
                f"{group} can't be said in an official configuration: {ours}, officially {official}"
            )
