"""Reference cases of DDT."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor, nn

from pipelines.stages.crop import center_crop
from tests.golden.case import Case, Outputs
from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.pixels import to_pixels, to_uint8
from udiff.autoencoders.posterior import PosteriorLatents
from udiff.diffusion.compose import compose
from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.guidance import guide
from udiff.diffusion.path import LinearPath, per_sample
from udiff.encoders.dinov2 import DINOv2, prepare_image
from udiff.models.ddt.checkpoint import convert_in, network_from_official
from udiff.models.ddt.network import ROTARY_EXTENT
from udiff.models.ddt.objective import make_flow_matching
from udiff.models.ddt.official_config import objective_keys, sampling_keys
from udiff.models.ddt.sampler import (
    CLOCKS,
    DIFFUSIONS,
    STEP_RULES,
    Slope,
    make_guidance,
    make_sampler,
)
from udiff.models.ddt.settings import DDTSampling, ObjectiveSettings
from udiff.nn.norm import RMSNorm
from udiff.nn.rotary import rotary_table, rotate
from udiff.nn.timestep import timestep_features
from udiff.samplers.adams import adams_coefficients
from udiff.samplers.reuse import (
    choose_refresh_steps,
    reuse_encoder,
    state_similarity,
    template_similarity,
)
from udiff.samplers.ticks import drive
from udiff.samplers.times import time_grid
from udiff.settings import AdamWSettings, EmaSettings
from udiff.system import LocalRng, Prediction, Query, Rng, Sampling, Steps
from udiff.training.ema import Ema
from udiff.training.optimizer import make_optimizer
from udiff.weights import load_strictly, read_checkpoint, strip_prefix

PROJECTOR = "diffusion_trainer.proj.0."


def tolerance(case: Case, output: str) -> float:
    if output.startswith(("grad", "param/", "ema/")) or case.kind == "train_steps_adamw_ema":
        return 1e-4
    if output.startswith("coeffs_"):
        solver = case.config["solvers"][int(output.removeprefix("coeffs_"))]
        return 1e-4 if solver["order"] == 4 else 1e-5
    if case.kind == "helpers_timestep_embedding":
        return 1e-4
    return 1e-5


# ---------------------------------------------------------------- network


def _network(case: Case) -> nn.Module:
    network = network_from_official(case.config.get("denoiser", case.config))
    weights = {k: t for k, t in case.weights.items() if not k.startswith(PROJECTOR)}
    load_strictly(network, weights, source=case.name)
    return network.eval()


def _forward(case: Case) -> Outputs:
    network, given = _network(case), case.inputs
    seen: dict = {}
    for index, block in enumerate(network.blocks):
        block.register_forward_hook(
            lambda _m, _a, out, i=index: seen.__setitem__(f"block_{i}", out)
        )
    for name in ("t_embedder", "y_embedder"):
        key = f"{name[0]}_emb"
        getattr(network, name).register_forward_hook(
            lambda _m, _a, out, key=key: seen.__setitem__(key, out[:, 0])
        )
    masks = [given[name].bool() for name in sorted(given) if name.startswith("mask")]
    if case.config["cls"] == "DDT":
        conditions = {"mask": masks[0] if masks else None}
    else:
        conditions = {"masks": tuple(masks)}
    prediction = network(given["x"], given["t"], label=given["y"], **conditions)
    return {**seen, "v": prediction.output, "state": prediction.state}


def _state_reuse(case: Case) -> Outputs:
    network, given = _network(case), case.inputs
    label = given["y"]
    first = network(given["x0"], given["t0"], label=label)
    fresh = network(given["x1"], given["t1"], label=label)
    reused = network(given["x1"], given["t1"], label=label, state=first.state)
    return {
        "state0": first.state,
        "v_reused": reused.output,
        "v_fresh": fresh.output,
        "state_fresh": fresh.state,
    }


def _checkpoint(case: Case) -> Outputs:
    given, denoiser = case.inputs, case.config["denoiser"]
    checkpoint = read_checkpoint(case.file.parent / case.config["checkpoint_file"])
    weights = convert_in(checkpoint, denoiser).weights
    found = {}
    for name, prefix in (("v_ema", "denoiser."), ("v_raw", "training.denoiser.")):
        network = network_from_official(denoiser)
        load_strictly(network, strip_prefix(weights, prefix), source=case.name)
        found[name] = network(given["x"], given["t"], label=given["y"]).output
    return found


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class GivenRng(LocalRng):
    """Hands out the case's draws in place of fresh ones: dropout, time, noise."""

    draws: Iterator[Tensor]

    def normal(self, num_rows: int, *shape: int) -> Tensor:
        return next(self.draws)

    uniform = normal


def _train(case: Case) -> Outputs:
    network, given, config = _network(case), case.inputs, case.config
    settings = ObjectiveSettings(**objective_keys(config["trainer"], config))
    dropout = LabelDropout(config["denoiser"]["num_classes"], config["null_condition_p"])
    composed = compose(
        make_flow_matching(settings, dropout),
        settings,
        dim=config["denoiser"]["hidden_size"],
        num_tokens=0,
        path=LinearPath(),
    )
    for module in composed.modules.values():
        load_strictly(module, strip_prefix(case.weights, PROJECTOR), source=case.name)
    asked: list = []

    def record(x_t: Tensor, t: Tensor, **conditions: Tensor) -> Prediction:
        prediction = network(x_t, t, **conditions)
        asked.append((x_t, t, conditions["label"], prediction.output))
        return prediction

    batch = {"latent": given["x"], "label": given["y"]}
    if "dino_features" in given:
        batch["dino_feature"] = given["dino_features"]
    order = [given["drop_uniform"], given["t_raw"], given["noise"]]
    rng = replace(Rng(0).at(0), local=GivenRng(torch.Generator(), 0, 1, iter(order)))
    losses = composed.objective(record, batch, composed.objective.draw(batch, rng))
    losses.total.backward()
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    for module in composed.modules.values():
        grads |= {PROJECTOR + name: p.grad for name, p in module.named_parameters()}
    [(x_t, t, label, pred)] = asked
    assert torch.allclose(t, given["t"], atol=1e-6)
    extras = {
        "alignment": "cos_loss",
        "velocity_direction": "cos_loss",
        "dispersive": "disperse_loss",
    }
    return {
        "loss": losses.total,
        "fm_loss": losses.terms["velocity_mse"],
        **{theirs: losses.terms[ours] for ours, theirs in extras.items() if ours in losses.terms},
        "x_t": x_t,
        "y_used": label,
        "pred": pred,
        "grad_norm": torch.stack([grad.norm() for grad in grads.values()]).norm(),
        **{f"grad/{name}": grad for name, grad in grads.items()},
    }


def _train_steps(case: Case) -> Outputs:
    network, given, config = _network(case), case.inputs, case.config
    keys = ("lr", "betas", "weight_decay", "eps")
    optimizer = make_optimizer([network], AdamWSettings(**{key: config[key] for key in keys}))
    ema = Ema({"ema": network}, EmaSettings(decay=config["ema_decay"]))
    dropout = LabelDropout(config["denoiser"]["num_classes"], config["null_condition_p"])
    objective = make_flow_matching(ObjectiveSettings(), dropout)
    losses = []
    for step in range(len(given["x"])):
        draws = {"label": given["y"][step], "t": given["t"][step], "noise": given["noise"][step]}
        loss = objective(network, {"latent": given["x"][step]}, draws).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(step)
        losses.append(loss.detach())
    parameters = {f"param/{name}": p for name, p in network.named_parameters()}
    averages = {key.replace("ema.", "ema/", 1): value for key, value in ema.averages.items()}
    return {"loss": torch.stack(losses), **parameters, **averages}


# ---------------------------------------------------------------- sampling


def _sample(case: Case) -> Outputs:
    network, config = _network(case), case.config
    settings = DDTSampling(**sampling_keys(config["sampler"], config))
    times = time_grid(settings.num_steps, last_step=settings.last_step, shift=settings.shift)
    begin = partial(_begin, case, settings, times)
    found: dict[str, Tensor] = {"timesteps": times}
    if settings.reuse is None:
        refresh_steps = range(settings.num_steps)
    elif settings.reuse.choice == "fixed":
        refresh_steps = range(0, settings.num_steps, settings.reuse.every)
    else:
        template = [begin(row, prefix="template_") for row in range(len(case.inputs["template_y"]))]
        found["similarity"] = template_similarity(network, template)
        budget = settings.num_steps // settings.reuse.every
        refresh_steps = choose_refresh_steps(found["similarity"], budget)
        found["recompute_steps"] = torch.tensor(refresh_steps)
    asked: list[list[Query]] = [[] for _ in case.inputs["y"]]
    samplings = []
    for row, queries in enumerate(asked):
        sampling = begin(row)
        steps = _watch(sampling.steps, queries)
        if settings.reuse:
            steps = reuse_encoder(steps, refresh_steps)
        samplings.append(replace(sampling, steps=steps))
    found["final"] = torch.stack(drive(network, samplings))
    found["net_x"] = torch.stack([torch.stack([q.x for q in queries]) for queries in asked], 1)
    found["net_t"] = torch.tensor([query.t for query in asked[0]])
    reused = [number not in refresh_steps for number in range(settings.num_steps)]
    return {**found, "encoder_reused": torch.tensor(reused)}


def _begin(
    case: Case, settings: DDTSampling, times: Tensor, row: int, *, prefix: str = ""
) -> Sampling:
    given = case.inputs
    null_label = given["y_null"][0]
    normals = iter(given["step_noise"][:, row]) if "step_noise" in given else iter(())
    return Sampling(
        make_sampler(settings, given[f"{prefix}noise"][row], times, normals),
        {"label": given[f"{prefix}y"][row]},
        {"label": null_label},
        make_guidance(settings, settings.guidance_scale),
    )


def _watch(steps: Steps, queries: list[Query]) -> Steps:
    answer = None
    while True:
        try:
            query = steps.send(answer)
        except StopIteration as end:
            return end.value
        queries.append(query)
        answer = yield query


# ---------------------------------------------------------------- parts


def _adam_coefficients(case: Case) -> Outputs:
    found = {}
    for index, solver in enumerate(case.config["solvers"]):
        settings = DDTSampling(**sampling_keys("AdamLMSampler", solver))
        times = time_grid(settings.num_steps, last_step=settings.last_step, shift=settings.shift)
        rows = adams_coefficients(times, order=settings.order, clock=CLOCKS[settings.clock])
        padded = [row + [0.0] * (settings.order - len(row)) for row in rows]
        found[f"coeffs_{index}"] = torch.tensor(padded)
        found[f"timedeltas_{index}"] = times.diff()
        found[f"timesteps_{index}"] = times
    return found


def _center_crop(case: Case) -> Outputs:
    found = {}
    for index, item in enumerate(case.config["items"]):
        picture = Image.fromarray(case.inputs[f"image_{index}"].numpy())
        found[f"crop_{index}"] = torch.from_numpy(np.array(center_crop(picture, item["size"])))
    return found


def _guidance(case: Case) -> Outputs:
    null, conditional = case.inputs["out"].chunk(2)
    found = {}
    for name in case.outputs:
        keys = sampling_keys("EulerSampler", {"guidance_fn": name})
        guidance = make_guidance(DDTSampling(**keys), case.config["cfg"])
        blend = partial(
            guide,
            scale=guidance.scale,
            channels=guidance.channels,
            first_channel=guidance.first_channel,
            other_scale=guidance.other_scale,
        )
        found[name] = torch.stack([blend(c, n) for c, n in zip(conditional, null, strict=True)])
    return found


def _pixels_latents(case: Case) -> Outputs:
    given, affine, scale = case.inputs, case.config["base_vae"], case.config["latent_scaling"]
    moments = {"latent_mean": given["mean"][None], "latent_logvar": given["logvar"][None]}

    def sample(std: float) -> Tensor:
        objective = make_flow_matching(ObjectiveSettings(), LabelDropout(1, 0.0))
        latents = PosteriorLatents(objective, (0.0,) * 4, (std,) * 4)
        return latents.sample(moments, given["eps"][None])[0]

    autoencoder = KLAutoencoder(_identity_model(given["z"].shape[1], **affine))
    levels = given["x"].view(1, 1, 1, -1)
    return {
        "uint8": to_uint8(levels).flatten(),
        "fp": to_pixels(given["u8"].view(1, 1, 1, -1)).flatten(),
        "latent": sample(1.0),
        "latent_scaled": sample(1 / scale),
        "base_encode": autoencoder.normalize(given["z"]),
        "base_decode": autoencoder.decode(given["z"]),
    }


class _identity_model(nn.Module):  # noqa: N801
    """Stands in for an autoencoder whose latents are its pixels; only the statistics are real."""

    def __init__(self, channels: int, *, scale: float, shift: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            latent_channels=channels, latents_mean=-shift * scale, latents_std=scale
        )

    def decode(self, raw: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=raw)


def _rmsnorm(case: Case) -> Outputs:
    norm = RMSNorm(case.config["dim"])
    load_strictly(norm, case.weights, source=case.name)
    return {"y": norm(case.inputs["x"])}


def _rope(case: Case) -> Outputs:
    found = {}
    for index, (head_dim, height, width) in enumerate(case.config["head_dim_H_W"]):
        table = rotary_table(
            (height, width), head_dim, extent=ROTARY_EXTENT, device=torch.device("cpu")
        )
        found |= {f"cos_{index}": table.cos, f"sin_{index}": table.sin}
        for name in ("q", "k"):
            x = case.inputs[f"{name}_{index}"].transpose(1, 2)
            found[f"{name}_rot_{index}"] = rotate(x, table).transpose(1, 2)
    return found


def _schedulers(case: Case) -> Outputs:
    t = per_sample(case.inputs["t"], torch.empty(len(case.inputs["t"]), 1, 1, 1))
    point = LinearPath().at(t)
    drift = point.alpha_dot / (point.alpha + 1e-6)
    return {
        "const_w": DIFFUSIONS["constant"](t[:1], point),
        "linear_w": DIFFUSIONS["linear"](t, point),
        "linear_alpha": point.alpha,
        "linear_sigma": point.sigma,
        "linear_dalpha": point.alpha_dot,
        "linear_dsigma": point.sigma_dot,
        "linear_dalpha_over_alpha": point.log_alpha_dot,
        "linear_dsigma_mul_sigma": point.sigma_dot * point.sigma,
        "linear_drift_coefficient": drift,
        "linear_diffuse_coefficient": point.sigma_dot * point.sigma - drift * point.sigma**2,
    }


def _sharing_dp(case: Case) -> Outputs:
    similarity = state_similarity(case.inputs["states"])
    budgets = {name: int(name.removeprefix("steps_K")) for name in case.outputs}
    return {k: torch.tensor(choose_refresh_steps(similarity, n)) for k, n in budgets.items()}


def _step_fns(case: Case) -> Outputs:
    given, found = case.inputs, {}
    for name in case.outputs:
        keys = sampling_keys("EulerSampler", {"step_fn": name})
        normals = iter([given[f"noise_{name}"]] if f"noise_{name}" in given else [])
        found[name] = STEP_RULES[keys["step"]](
            given["x"],
            Slope(given["v"], given["s"]),
            step=given["dt"].item(),
            diffusion=given["w"],
            normals=normals,
        )
    return found


def _timestep_embedding(case: Case) -> Outputs:
    dim, max_period = case.config["dim"], case.config["max_period"]
    return {"emb": timestep_features(case.inputs["t"], dim, max_period=float(max_period))}


def _timesteps(case: Case) -> Outputs:
    return {
        f"timesteps_{index}": time_grid(
            grid["num_steps"], last_step=grid["last_step"], shift=grid["timeshift"]
        )
        for index, grid in enumerate(case.config["grids"])
    }


def _repa_preprocess(case: Case) -> Outputs:
    """With patches embedded to zeros, what enters the blocks is the position table."""
    given, patch = case.inputs, case.config["patch"]
    model = VisionTransformer(
        img_size=[patch * side for side in case.config["source_grid"]],
        patch_size=patch,
        embed_dim=given["pos_embed"].shape[-1],
        depth=1,
        num_heads=1,
        num_classes=0,
        dynamic_img_size=True,
    )
    seen: dict[str, Tensor] = {}
    model.blocks.register_forward_pre_hook(lambda _m, args: seen.update(tokens=args[0]))
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.cls_token.zero_()
        model.pos_embed.copy_(given["pos_embed"])
    DINOv2(model)(given["raw"])
    return {"encoder_input": prepare_image(given["raw"]), "pos_embed": seen["tokens"][:1]}


class _Runners(dict[str, Callable[[Case], Outputs]]):
    """Kinds of one family that differ in their configuration share a runner."""

    _FAMILIES = (
        ("ddt_forward_", _forward),
        ("dit_forward_", _forward),
        ("sample_", _sample),
        ("train_", _train),
        ("repa_preprocess_", _repa_preprocess),
    )

    def __missing__(self, kind: str) -> Callable[[Case], Outputs]:
        return next(runner for prefix, runner in self._FAMILIES if kind.startswith(prefix))

    def __contains__(self, kind: object) -> bool:
        known = str(kind).startswith(tuple(prefix for prefix, _ in self._FAMILIES))
        return super().__contains__(kind) or known


RUNNERS = _Runners(
    ckpt_import=_checkpoint,
    ddt_forward_state_reuse=_state_reuse,
    helpers_adam_coeffs=_adam_coefficients,
    helpers_center_crop=_center_crop,
    helpers_guidance=_guidance,
    helpers_pixels_latents=_pixels_latents,
    helpers_rmsnorm=_rmsnorm,
    helpers_rope=_rope,
    helpers_schedulers=_schedulers,
    helpers_sharing_dp=_sharing_dp,
    helpers_step_fns=_step_fns,
    helpers_timestep_embedding=_timestep_embedding,
    helpers_timesteps=_timesteps,
    train_steps_adamw_ema=_train_steps,
)
