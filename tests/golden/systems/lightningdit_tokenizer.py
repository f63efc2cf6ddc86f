"""Reference cases of VA-VAE, the tokenizer of LightningDiT."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor, nn

from pipelines.stages.crop import center_crop
from tests.golden.case import Case, Outputs, relative_error
from udiff.autoencoders.kl import KLAutoencoder, split_moments
from udiff.autoencoders.perceptual import LPIPS
from udiff.autoencoders.pixels import to_pixels, to_uint8
from udiff.encoders.foundation import FoundationModel
from udiff.evaluation.frechet import feature_statistics, statistics_distance
from udiff.evaluation.inception import MixedA
from udiff.evaluation.reconstruction import evaluation_crop, psnr, ssim
from udiff.models.lightningdit.checkpoint import network_from_official as dit_from_official
from udiff.models.lightningdit.recipe import guidance_from
from udiff.models.lightningdit.transport import even_times
from udiff.models.vavae.adversarial import hinge_loss, vanilla_loss
from udiff.models.vavae.alignment import distance_matrix_loss, marginal_cosine_loss
from udiff.models.vavae.checkpoint import network_from_official
from udiff.models.vavae.discriminator import PatchDiscriminator
from udiff.models.vavae.objective import RECONSTRUCTION
from udiff.models.vavae.official_config import adversarial_starts, network_keys, objective_keys
from udiff.models.vavae.recipe import (
    make_alignment,
    make_discriminator,
    make_discriminator_objective,
    make_generator_objective,
    make_projection,
)
from udiff.models.vavae.settings import FoundationSettings, NetworkSettings, ObjectiveSettings
from udiff.samplers.euler import euler
from udiff.samplers.ticks import drive
from udiff.settings import AdamWSettings, TrainSettings
from udiff.system import Batch, Draws, Guidance, Losses, Phase, Sampling, StepRng, System
from udiff.training.log import read_metrics
from udiff.training.run import local_run
from udiff.training.trainer import train
from udiff.weights import load_strictly, strip_prefix

SENSITIVE = ("g_loss", "logits_", "d_weight", "vf_weight", "grad")
"""Means near 0 and ratios of gradient norms."""
LOGGED = {
    "nll": "nll_loss",
    "kl": "kl_loss",
    "error": "rec_loss",
    "adversarial": "g_loss",
    "adversarial_weight": "d_weight",
    "adversarial_factor": "disc_factor",
    "alignment": "vf_loss",
    "alignment_weight": "vf_weight",
    "logits_real": "logits_real",
    "logits_fake": "logits_fake",
}
PICTURES = ("uint8", "center_crop", "transform", "transform_flip", "eval_transform")


def tolerance(case: Case, output: str) -> float:
    if output in PICTURES:
        return 1.001  # levels
    if case.kind == "vae_train_loop":
        return 0.05 * case.config["lr"] if output.startswith("param/") else 5e-4
    return 2e-4 if output.rpartition("/")[2].startswith(SENSITIVE) or "grad" in output else 1e-5


def error(case: Case, output: str, ours: Tensor, theirs: Tensor) -> float:
    """Compare pictures in levels of 255, weights after training by their largest difference."""
    if output in PICTURES or output.startswith("param/"):
        if ours.shape != theirs.shape:
            return float("inf")
        scale = 127.5 if output in PICTURES and theirs.is_floating_point() else 1.0
        return scale * (ours.double() - theirs.double()).abs().max().item()
    return relative_error(ours, theirs)


# ---------------------------------------------------------------- autoencoder


def _autoencoder(case: Case, prefix: str = "") -> KLAutoencoder:
    network = network_from_official({"embed_dim": _latent_channels(case), **case.config})
    own = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    weights = strip_prefix(case.weights, prefix)
    weights = {key: tensor for key, tensor in weights.items() if key.startswith(own)}
    load_strictly(network, weights, source=case.name)
    return KLAutoencoder(network)


def _latent_channels(case: Case) -> int:
    return case.config.get("embed_dim", case.config["ddconfig"]["z_channels"])


@torch.no_grad()
def _forward(case: Case) -> Outputs:
    autoencoder, pixels = _autoencoder(case).eval(), case.inputs["x"]
    network = autoencoder.model
    enc = network.encoder(pixels)
    moments = autoencoder.encode_moments(pixels)
    outputs = {
        "enc": enc,
        "moments": network.quant_conv(enc),
        "mean": moments.mean,
        "logvar": moments.logvar,
        "std": (0.5 * moments.logvar).exp(),
        "kl": moments.elementwise_kl().sum((1, 2, 3)),
        "kl_no_sum": 2 * moments.elementwise_kl(),
        "rec_mode": autoencoder.decode(autoencoder.normalize(moments.mean)),
    }
    if "eps" in case.inputs:
        made = autoencoder(pixels, case.inputs["eps"])
        outputs |= {"z": made.raw, "nll": moments.nll(made.raw), "rec": made.pixels}
        outputs["uint8"] = to_uint8(made.pixels)
    return outputs


def _posterior(case: Case) -> Outputs:
    given = case.inputs
    moments = split_moments(given["moments"])
    calm, other = (split_moments(given[name].clamp(-3, 3)) for name in ("moments", "moments_b"))
    return {
        "mean": moments.mean,
        "logvar": moments.logvar,
        "std": (0.5 * moments.logvar).exp(),
        "var": moments.logvar.exp(),
        "sample": moments.sample(given["eps"]),
        "kl_clamped_moments": calm.elementwise_kl().sum((1, 2, 3)),
        "kl_to_b_clamped_moments": calm.kl_from(other),
        "nll_clamped_moments": calm.nll(given["x"]),
    }


# ---------------------------------------------------------------- losses


def _lpips_patchgan(case: Case) -> Outputs:
    config, (a, b) = case.config, (case.inputs["a"], case.inputs["b"])
    lpips = _lpips(strip_prefix(case.weights, "lpips."), case)
    discriminator = PatchDiscriminator(width=config["ndf"], num_layers=config["n_layers"])
    load_strictly(discriminator, strip_prefix(case.weights, "disc."), source=case.name)
    with torch.no_grad():
        judged = discriminator.eval()(a)
        real, fake = discriminator.train()(a), discriminator(b)
    return {
        "lpips": lpips(a, b),
        "disc_eval": judged,
        "disc_train": real,
        "hinge_d": hinge_loss(real, fake),
        "vanilla_d": vanilla_loss(real, fake),
    }


def _lpips(weights: dict[str, Tensor], case: Case) -> LPIPS:
    widths = case.config.get("vgg_widths") or case.config["lpips_vgg_widths"]
    lpips = LPIPS(tuple(widths))
    load_strictly(lpips, weights, source=case.name)
    return lpips


def _vf_loss(case: Case) -> Outputs:
    feature, outputs = case.inputs["aux_feature"], {}
    for margins in case.config["margins"]:
        distance_margin, cosine_margin = margins["distmat_margin"], margins["cos_margin"]
        name = f"m{distance_margin}_{cosine_margin}"
        z = case.inputs["z"].clone().requires_grad_()
        distance = distance_matrix_loss(z, feature, margin=float(distance_margin))
        cosine = marginal_cosine_loss(z, feature, margin=float(cosine_margin))
        outputs |= {
            f"vf_dist/{name}": distance,
            f"vf_cos/{name}": cosine,
            f"vf_both/{name}": distance + cosine,
            f"grad_z_dist/{name}": torch.autograd.grad(distance, z)[0],
            f"grad_z_cos/{name}": torch.autograd.grad(cosine, z)[0],
        }
    return outputs | _through_projection(case)


def _through_projection(case: Case) -> Outputs:
    latent = case.inputs["z_unprojected"].clone().requires_grad_()
    feature, margins = case.inputs["aux_feature"], case.config["margins"][-1]
    settings = FoundationSettings(
        model="cache",
        feature_dim=feature.shape[1],
        distance_margin=margins["distmat_margin"],
        cosine_margin=margins["cos_margin"],
    )
    projection = make_projection(settings, latent.shape[1])
    load_strictly(projection, strip_prefix(case.weights, "linear_proj."), source=case.name)
    loss = make_alignment(settings, projection, None).compare(latent, feature)
    loss.backward()
    return {
        "vf_through_proj": loss,
        "grad_z_through_proj": latent.grad,
        "grad_proj": projection.weight.grad,
    }


class _Game:
    """All that a training case needs, made by the recipe's own functions."""

    def __init__(self, case: Case, **changed: int) -> None:
        config, features = case.config, case.inputs.get("foundation_feature")
        keys = objective_keys(config, config["lossconfig"])
        weights = case.weights
        if "loss.logvar" in weights:
            keys["logvar"] = weights["loss.logvar"].item()
        self.modules: dict[str, nn.Module] = {"autoencoder": _autoencoder(case)}
        if "adversarial" in keys:
            keys["adversarial"] |= {"width": config["disc_ndf"], **changed}
        if features is not None:
            keys["alignment"] |= {"model": "cache", "feature_dim": features.shape[-3]}
        self.settings = ObjectiveSettings.model_validate(keys)
        network = NetworkSettings.model_validate(network_keys(config))
        if self.settings.alignment:
            projection = make_projection(self.settings.alignment, network.latent_channels)
            load_strictly(projection, strip_prefix(weights, "linear_proj."), source=case.name)
            self.modules["projection"] = projection
        if self.settings.adversarial:
            discriminator = make_discriminator(self.settings.adversarial)
            own = strip_prefix(weights, "loss.discriminator.")
            load_strictly(discriminator, own, source=case.name)
            self.modules["discriminator"] = discriminator
        self.generator = make_generator_objective(
            network,
            self.settings,
            self.modules,
            perceptual=_lpips(strip_prefix(weights, "loss.perceptual_loss."), case),
        )

    def generate(self, batch: Batch, draws: Draws) -> Losses:
        return self.generator(self.modules["autoencoder"], batch, draws)

    def discriminate(self, batch: Batch, draws: Draws) -> Losses:
        assert self.settings.adversarial
        objective = make_discriminator_objective(self.settings.adversarial)
        return objective(self.modules["discriminator"], batch, draws)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Under their official names."""
        return {_official(key): p for key, p in nn.ModuleDict(self.modules).named_parameters()}


def _official(key: str) -> str:
    for ours, official in (
        ("autoencoder.model.", ""),
        ("projection.", "linear_proj."),
        ("discriminator.", "loss.discriminator."),
    ):
        if key.startswith(ours):
            return official + key.removeprefix(ours)
    raise AssertionError(key)


def _columns(case: Case, *step: int) -> Batch:
    """Make a batch whose cached features are the case's grid, as tokens."""
    pixels = case.inputs["x"] if "x" in case.inputs else case.inputs["images_nhwc"][step]
    batch = {"pixels": pixels if not step else pixels.permute(0, 3, 1, 2)}
    if "foundation_feature" in case.inputs:
        grid = case.inputs["foundation_feature"][step]
        batch["dino_feature"] = grid.flatten(2).mT
    return batch


def _loss(case: Case) -> Outputs:
    outputs: dict[str, Tensor] = {}
    for step in case.config["global_steps"]:
        found = _loss_at(case, step)
        outputs |= {f"gs{step}/{name}": value for name, value in found.items()}
        outputs |= {
            name: found[name] for name in ("rec", "z_for_vf", "aux_for_vf") if name in found
        }
    return outputs


def _loss_at(case: Case, step: int) -> dict[str, Tensor]:
    """Compute both losses at a published step, which both compare with `disc_start` here."""
    start = case.config["lossconfig"]["disc_start"]
    game = _Game(case, generator_start=start, discriminator_start=start)
    batch, at = _columns(case), torch.tensor(float(step))
    made = game.generate(batch, {"noise": case.inputs["eps"], "step": at})
    made.total.backward()
    grads = _gradients(game)
    judged = game.discriminate({**batch, **made.carry}, {"step": at})
    for parameter in game.parameters().values():
        parameter.grad = None
    judged.total.backward()
    discriminator = {k: g for k, g in _gradients(game).items() if k.startswith("loss.")}
    batch_norm = game.modules["discriminator"].main[3]
    ae = [g for key, g in grads.items() if not key.startswith("loss.")]
    found = {LOGGED[k]: v for k, v in {**made.terms, **judged.terms}.items() if k in LOGGED}
    return {
        **found,
        **_aligned(case, game),
        "total_loss": made.total,
        "disc_loss": judged.total,
        "logvar": torch.tensor(game.settings.logvar),
        "rec": made.carry[RECONSTRUCTION],
        "grad_norm_ae": torch.stack([g.norm() for g in ae]).norm(),
        "grad_norm_disc": torch.stack([g.norm() for g in discriminator.values()]).norm(),
        "disc_bn_running_mean_after": batch_norm.running_mean,
        "disc_bn_running_var_after": batch_norm.running_var,
        **{f"grad/{key}": g for key, g in {**grads, **discriminator}.items()},
    }


def _gradients(game: _Game) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in game.parameters().items() if p.grad is not None}


@torch.no_grad()
def _aligned(case: Case, game: _Game) -> dict[str, Tensor]:
    """Compute what the terms of the alignment compare."""
    if game.settings.alignment is None:
        return {}
    made = game.modules["autoencoder"](case.inputs["x"], case.inputs["eps"])
    alignment = game.generator.extras[-1]
    feature = alignment.foundation(_columns(case))
    latent, feature = alignment.pairing(alignment.projection, made.raw, feature)
    return {"z_for_vf": latent, "aux_for_vf": feature}


def _train_loop(case: Case) -> Outputs:
    """Train with the project's own trainer, from stored pictures, features and noise."""
    config = case.config
    game = _Game(case, **adversarial_starts(config["lossconfig"]["disc_start"]))
    steps, batch_size = case.inputs["eps"].shape[:2]
    optimizer = AdamWSettings(lr=config["lr"], betas=tuple(config["adam_betas"]))

    def draw(batch: Batch, rng: StepRng) -> Draws:
        return {"noise": case.inputs["eps"][rng.step], "step": torch.tensor(float(rng.step))}

    learners = tuple(name for name in game.modules if name != "discriminator")
    phases = (
        Phase("autoencoder", learners, draw, game.generate, optimizer),
        Phase("discriminator", ("discriminator",), draw, game.discriminate, optimizer),
    )
    system = System(game.modules, phases, columns=())

    def batches(first_step: int) -> Iterator[Batch]:
        yield from (_columns(case, step) for step in range(first_step, steps))

    settings = TrainSettings(
        images=steps * batch_size, batch_size=batch_size, shard="root", log_every=1
    )
    with tempfile.TemporaryDirectory() as name, local_run() as run:
        trained = train(system, batches, settings, ema=None, folder=Path(name), run=run)
        rows = read_metrics(Path(name))
    logvar = torch.tensor(game.settings.logvar)
    return {
        **_calls(rows, logvar),
        "global_steps": torch.arange(2 * steps),
        **{f"param/{_official(key)}": tensor for key, tensor in trained.weights.items()},
        "param/loss.logvar": logvar,
    }


def _calls(rows: list[dict[str, float]], logvar: Tensor) -> dict[str, Tensor]:
    """Name the metrics of each step as the two calls of the published loss."""
    outputs: dict[str, Tensor] = {}
    for step, row in enumerate(rows):
        for number, phase in enumerate(("autoencoder", "discriminator")):
            own = {k.removeprefix(f"{phase}/"): v for k, v in row.items() if k.startswith(phase)}
            named = {LOGGED[name]: value for name, value in own.items() if name in LOGGED}
            named["disc_loss" if number else "total_loss"] = own["loss"]
            call = f"call{2 * step + number}"
            outputs |= {f"{call}/{name}": torch.tensor(v) for name, v in named.items()}
        outputs[f"call{2 * step}/logvar"] = logvar
    return outputs


# ---------------------------------------------------------------- foundation, metrics, pictures


def _foundation(case: Case) -> Outputs:
    vit = case.config["vit"]
    model = VisionTransformer(
        img_size=vit["img"],
        patch_size=vit["patch"],
        embed_dim=vit["dim"],
        depth=vit["depth"],
        num_heads=vit["heads"],
        init_values=vit["init_values"],
        num_classes=0,
        dynamic_img_size=True,
    )
    weights = strip_prefix(case.weights, "foundation_model.model.")
    load_strictly(model, weights, source=case.name)
    return {"feature": FoundationModel(model)(case.inputs["x"])}


def _metrics(case: Case) -> Outputs:
    given = case.inputs
    images = [given[name].permute(1, 2, 0)[None].to(torch.uint8) for name in ("img_a", "img_b")]
    statistics = [feature_statistics(given[name]) for name in ("feat1", "feat2")]
    block_weights = strip_prefix(case.weights, "inception_a.")
    pool_features = len(block_weights["branch_pool.bn.weight"])
    block = MixedA(given["inception_x"].shape[1], pool_features)
    load_strictly(block, block_weights, source=case.name)
    with torch.no_grad():
        joined = block.eval()(given["inception_x"])
    return {
        "psnr": psnr(*images)[0],
        "ssim": ssim(given["ssim_pred"], given["ssim_target"]).mean(),
        "fid": torch.tensor(statistics_distance(*statistics), dtype=torch.float64),
        "inception_a": joined,
    }


def _image_ops(case: Case) -> Outputs:
    image, size = case.inputs["image"], case.config["size"]
    cropped = torch.tensor(list(center_crop(Image.fromarray(image.numpy()), size).tobytes()))
    cropped = cropped.to(torch.uint8).view(size, size, 3)
    pixels = to_pixels(cropped[None])[0]
    return {
        "center_crop": cropped,
        "transform": pixels,
        "transform_flip": pixels.flip(-1),
        "eval_transform": evaluation_crop(image, size),
        "uint8": to_uint8(case.inputs["x"]),
    }


# ---------------------------------------------------------------- from noise to pictures


@torch.no_grad()
def _pipeline(case: Case) -> Outputs:
    config, given = case.config, case.inputs
    network = dit_from_official(config["dit"])
    load_strictly(network, strip_prefix(case.weights, "dit/"), source=case.name)
    latent = torch.stack(drive(network, _samplings(config, given)))
    autoencoder = _autoencoder(case, "vae/")
    mean = tuple(given["latent_mean"].flatten().tolist())
    std = (given["latent_std"].flatten() / config["latent_multiplier"]).tolist()
    autoencoder.set_statistics(mean, tuple(std))
    pixels = autoencoder.decode(latent)
    return {
        "latent": latent,
        "latent_denorm": latent * autoencoder.latent_std + autoencoder.latent_mean,
        "image": pixels,
        "uint8": to_uint8(pixels),
    }


def _samplings(config: dict[str, Any], given: dict[str, Tensor]) -> list[Sampling]:
    interval = guidance_from(config["cfg_interval_start"], 1.0)
    guidance = Guidance(config["cfg_scale"], interval, 3)
    shift = 1 / (config["timestep_shift"] or 1.0)
    times = even_times((0.0, 1.0), config["num_steps"] - 1, shift=shift)
    null = torch.tensor(config["dit"]["num_classes"])
    return [
        Sampling(euler(z, times), {"label": label}, {"label": null}, guidance)
        for z, label in zip(given["z"], given["y"], strict=True)
    ]


RUNNERS = {
    "eval_metrics": _metrics,
    "image_ops": _image_ops,
    "pipeline_sample": _pipeline,
    "vae_forward": _forward,
    "vae_forward_b": _forward,
    "vae_loss_plain_ldm": _loss,
    "vae_loss_vf_adaptive": _loss,
    "vae_loss_vf_fixed_noreverse": _loss,
    "vae_lpips_patchgan": _lpips_patchgan,
    "vae_marvae": _forward,
    "vae_posterior": _posterior,
    "vae_train_loop": _train_loop,
    "vf_foundation_dinov2": _foundation,
    "vf_foundation_mae": _foundation,
    "vf_loss": _vf_loss,
}
