"""Reference cases of LightningDiT (those of its tokenizer belong to the VA-VAE)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from tests.golden.case import Case, Outputs, relative_error
from tests.golden.systems import lightningdit_tokenizer
from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.posterior import PosteriorLatents
from udiff.diffusion.compose import compose
from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.flow_matching import FlowMatching
from udiff.diffusion.guidance import guide
from udiff.diffusion.parameterization import NOISE, SCORE, VELOCITY, Ends, convert
from udiff.diffusion.path import LinearPath, per_sample
from udiff.diffusion.time import LogitNormalTime, Rescaled, Restricted, UniformTime
from udiff.models.lightningdit.checkpoint import network_from_official
from udiff.models.lightningdit.latents import measure_latents, statistics_keys
from udiff.models.lightningdit.network import (
    RotaryEmbedding,
    position_table,
    unpatchify,
)
from udiff.models.lightningdit.official_config import objective_keys
from udiff.models.lightningdit.recipe import guidance_from
from udiff.models.lightningdit.settings import ObjectiveSettings, TransportSampling
from udiff.models.lightningdit.transport import (
    DIFFUSIONS,
    PATHS,
    Transport,
    even_times,
    make_flow_matching,
    make_last_step,
    make_reverse,
    solve_ode,
    solve_sde,
)
from udiff.nn.norm import RMSNorm, modulate
from udiff.nn.rotary import rotate
from udiff.nn.timestep import timestep_features
from udiff.samplers import sde
from udiff.samplers.prediction import from_prediction
from udiff.samplers.ticks import drive
from udiff.settings import AdamWSettings, AutoencoderSettings, EmaSettings
from udiff.system import Guidance, LocalRng, Prediction, Sampling, Steps
from udiff.training.ema import Ema
from udiff.training.optimizer import clip_gradients, make_optimizer
from udiff.weights import load_strictly

DIFFUSION_FORMS = {
    "SBDM": "path",
    "sigma": "sigma",
    "linear": "linear",
    "decreasing": "decreasing",
    "inccreasing-decreasing": "middle",
    "constant": "constant",
}
METHODS = {"heun2": "heun", "Euler": "sde_euler", "Heun": "sde_heun"}
FLOW_MATCHING = FlowMatching(LinearPath(), UniformTime(), LabelDropout(0, 0.0))
LAST_STEPS = {"Mean": "mean", "Euler": "ode", "Tweedie": "tweedie", None: "none"}


def tolerance(case: Case, output: str) -> float:
    if case.kind in lightningdit_tokenizer.RUNNERS:
        return lightningdit_tokenizer.tolerance(case, output)
    if output.startswith(("param/", "ema_delta/")):
        largest = case.outputs[output].abs().max().item()
        return 0.01 * case.config["lr"] / largest
    if output.startswith("grad"):
        return 1e-4
    if output == "score_from_velocity":
        return 5e-5
    methods = {run["out"]: (run["method"], run["mode"]) for run in case.config.get("runs", [])}
    if methods.get(output, ("",))[0] == "dopri5":
        return 3e-4 if methods[output][1].startswith("cfg") else 2e-5
    return 1e-5


def error(case: Case, output: str, ours: Tensor, theirs: Tensor) -> float:
    own = case.kind in lightningdit_tokenizer.RUNNERS
    compare = lightningdit_tokenizer.error if own else _relative_error
    return compare(case, output, ours, theirs)


def _relative_error(case: Case, output: str, ours: Tensor, theirs: Tensor) -> float:
    return relative_error(ours, theirs)


# ---------------------------------------------------------------- network


def _network(case: Case) -> nn.Module:
    network = network_from_official(case.config)
    load_strictly(network, case.weights, source=case.name)
    return network


def _forward(case: Case) -> Outputs:
    network, given = _network(case), case.inputs
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _m, _a, out: seen.__setitem__(name, out))

    for name, module in {
        "patch_embed": network.x_embedder,
        "t_emb": network.t_embedder,
        "y_emb": network.y_embedder,
        "block0_attn": network.blocks[0].attn,
        "block0_mlp": network.blocks[0].mlp,
        "final_layer": network.final_layer,
        **{f"block{index}": block for index, block in enumerate(network.blocks)},
    }.items():
        keep(name, module)
    return {"pred": network(given["x"], given["t"], label=given["y"]).output, **seen}


def _forward_with_cfg(case: Case) -> Outputs:
    network, given, start = _network(case), case.inputs, case.config["cfg_interval_start"]
    guided = Guidance(case.config["cfg_scale"], guidance_from(start, 1.0), 3)
    always = Guidance(case.config["cfg_scale"], None, 3)
    ask = partial(_answer_both_halves, network, given["y"], given["z"])
    return {
        "interval_above": ask(start + 0.2, guided),
        "interval_equal": ask(start, guided),
        "interval_below": ask(start / 2, guided),
        "no_interval_below": ask(start / 2, always),
    }


def _answer_both_halves(
    network: nn.Module, label: Tensor, z: Tensor, t: float, guidance: Guidance
) -> Tensor:
    """The published batch is [conditional; unconditional], both at the first half's x."""
    half = len(z) // 2
    x = torch.cat([z[:half], z[:half]])
    answer = network(x, torch.full((len(x),), t), label=label).output
    conditional, null = answer.chunk(2, dim=0)
    scale, channels = guidance.scale_at(float(np.float32(t))), guidance.channels
    pairs = list(zip(conditional, null, strict=True))
    first = [guide(c, n, scale=scale, channels=channels) for c, n in pairs]
    second = [torch.cat([f[:channels], n[channels:]]) for f, n in zip(first, null, strict=True)]
    return torch.stack(first + second)


def _helpers(case: Case) -> Outputs:
    given, config = case.inputs, case.config
    rotary = RotaryEmbedding(config["rope_grid"], config["head_dim"])
    norm = RMSNorm(given["rmsnorm_weight"].shape[0])
    norm.weight.data = given["rmsnorm_weight"]
    mod_x, scale, shift = given["mod_x"], given["mod_scale"][:, None], given["mod_shift"][:, None]
    tokens, side = given["unpatchify_tokens"], case.outputs["unpatchify"].shape[-1]
    grid = math.isqrt(tokens.shape[1])
    features = [name for name in case.outputs if name.startswith("timestep_embedding_")]
    return {
        "pos_embed": position_table(config["pos_embed_dim"], config["pos_grid"]),
        "rope_cos": rotary.freqs_cos,
        "rope_sin": rotary.freqs_sin,
        "rope_q": rotate(given["rope_q"], rotary()),
        "rmsnorm": norm(given["x_rms"]),
        "rmsnorm_bf16_input": norm(given["x_rms"].bfloat16()),
        "modulate": modulate(mod_x, scale, shift),
        "modulate_noshift": modulate(mod_x, scale, None),
        "unpatchify": unpatchify(tokens, side // grid, grid),
        **{
            name: timestep_features(given["t"], int(name.rpartition("_")[2]), max_period=10000.0)
            for name in features
        },
    }


# ---------------------------------------------------------------- training


def _objective(case: Case, transport: dict) -> Callable:
    settings = ObjectiveSettings(**objective_keys(transport))
    dropout = LabelDropout(case.config.get("num_classes", 0), 0.1)
    transport = Transport.make(settings)
    return compose(
        make_flow_matching(settings, transport, dropout),
        settings,
        dim=0,
        num_tokens=0,
        path=transport.path,
        prediction=transport.prediction,
    ).objective


def _draws(case: Case, *step: int) -> tuple[dict, dict]:
    given = {name: tensor[step] for name, tensor in case.inputs.items()}
    dropout = LabelDropout(case.config["num_classes"], case.config["class_dropout_prob"])
    label = dropout.drop(given["y"], 1.0 - given["drop_ids"])
    return {"latent": given["x1"]}, {"label": label, "t": given["t"], "noise": given["x0"]}


def _train_loss(case: Case) -> Outputs:
    network, transport = _network(case), case.config["transport"]
    objective, (batch, draws) = _objective(case, transport), _draws(case)
    path = PATHS[transport["path_type"].lower()]
    point = path.at(per_sample(draws["t"], batch["latent"]))
    x_t = point.place(batch["latent"], draws["noise"])
    losses = objective(network, batch, draws)
    losses.total.backward()
    trained = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    rows = [_losses_of_row(objective, network, batch, draws, row) for row in range(len(draws["t"]))]
    return {
        "total": losses.total,
        "loss_per_sample": torch.stack([row[f"{transport['prediction']}_mse"] for row in rows]),
        "cos_loss_per_sample": torch.stack(
            [row.get("velocity_direction", torch.zeros(())) for row in rows]
        ),
        "pred": network(x_t, draws["t"], label=draws["label"]).output,
        "grad_norm": torch.stack([g.norm() for g in trained.values()]).norm(),
        **{f"grad/{name}": grad for name, grad in trained.items()},
    }


def _losses_of_row(
    objective: Callable, network: Callable, batch: dict, draws: dict, row: int
) -> dict[str, Tensor]:
    def cut(tensors: dict) -> dict:
        return {name: tensor[row : row + 1] for name, tensor in tensors.items()}

    return objective(network, cut(batch), cut(draws)).terms


def _train_steps(case: Case) -> Outputs:
    config, network = case.config, _network(case)
    settings = AdamWSettings(
        lr=config["lr"],
        betas=(config["beta1"], config["beta2"]),
        weight_decay=config["weight_decay"],
        clip_norm=config["max_grad_norm"],
    )
    optimizer = make_optimizer([network], settings)
    ema = Ema({"denoiser": network}, EmaSettings(decay=config["ema_decay"]))
    objective = _objective(
        case,
        {
            "path_type": "Linear",
            "prediction": "velocity",
            "use_cosine_loss": config["use_cosine_loss"],
        },
    )
    losses, norms = [], []
    for step in range(len(case.inputs["t"])):
        total = objective(network, *_draws(case, step)).total
        total.backward()
        norms.append(clip_gradients(optimizer, settings.clip_norm))
        optimizer.step()
        network.zero_grad(set_to_none=True)
        ema.update(step)
        losses.append(total)
    averages = {name.removeprefix("denoiser."): t for name, t in ema.averages.items()}
    return {
        "losses": torch.stack(losses),
        "grad_norms_before_clip": torch.stack(norms),
        **{f"param/{name}": p for name, p in network.named_parameters()},
        **{f"ema_delta/{name}": t - case.weights[name] for name, t in averages.items()},
    }


# ---------------------------------------------------------------- transport


def _path(case: Case) -> Outputs:
    given, path = case.inputs, PATHS[case.config["path_type"].lower()]
    x, v = given["x"], given["v"]
    point = path.at(given["t"])
    wide_t = per_sample(given["t"], x)
    wide = path.at(wide_t)
    forms = [name.split("/") for name in case.outputs if name.startswith("diffusion/")]
    return {
        "alpha": point.alpha,
        "sigma": point.sigma,
        "d_alpha": point.alpha_dot,
        "d_sigma": point.sigma_dot,
        "alpha_ratio": point.log_alpha_dot,
        # Where the score is 0, the velocity is the drift's negative.
        "drift_mean": -convert(torch.zeros_like(x), x, wide, source=SCORE, target=VELOCITY),
        "drift_var": wide.diffusivity,
        "score_from_velocity": convert(v, x, wide, source=VELOCITY, target=SCORE),
        "noise_from_velocity": convert(v, x, wide, source=VELOCITY, target=NOISE),
        "velocity_from_score": convert(v, x, wide, source=SCORE, target=VELOCITY),
        **{
            f"diffusion/{form}/{norm}": DIFFUSIONS[DIFFUSION_FORMS[form]](
                wide_t, wide, norm=float(norm)
            )
            for _, form, norm in forms
        },
    }


def _losses(case: Case) -> Outputs:
    given, path_type = case.inputs, case.config["path_type"]
    batch = {"latent": given["x1"], "model_output": given["model_output"]}
    draws = {"t": given["t"], "noise": given["x0"], "label": torch.zeros(len(given["t"]))}

    def losses(prediction: str, weight: str | None, term: str) -> Tensor:
        objective = _objective(
            case,
            {
                "path_type": path_type,
                "prediction": prediction,
                "loss_weight": weight,
                "use_cosine_loss": True,
            },
        )
        rows = []
        for row, output in enumerate(given["model_output"]):
            network = _Answering(output[None])
            rows.append(_losses_of_row(objective, network, batch, draws, row)[term])
        return torch.stack(rows)

    names = [name.split("/") for name in case.outputs if name.startswith("loss/")]
    ends = Ends(given["x1"], given["x0"])
    point = PATHS[path_type.lower()].at(per_sample(given["t"], ends.data))
    return {
        "xt": point.place(*ends),
        "ut": VELOCITY.target(ends, point),
        "cos_loss": losses("velocity", None, "velocity_direction"),
        **{
            f"loss/{prediction}/{weight}": losses(
                prediction, None if weight == "None" else weight, f"{prediction}_mse"
            )
            for _, prediction, weight in names
        },
    }


@dataclass
class _Answering:
    """A network with a given answer."""

    output: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, *, label: Tensor) -> Prediction:
        return Prediction(self.output)


def _intervals(case: Case) -> Outputs:
    for row in case.header.get("rows", []):
        _check_intervals(row)
    grids = [name.split("/") for name in case.outputs if name.startswith("ode_grid/")]
    return {
        f"ode_grid/{shift}/{points}": even_times(
            (0.0, 1.0), int(points[1:]) - 1, shift=_shift(float(shift.removeprefix("shift")))
        )
        for _, shift, points in grids
    }


def _shift(official: float) -> float:
    return 1 / official if official > 0 else 1.0


def _check_intervals(row: dict) -> None:
    keys = {"path_type": row["path"], "prediction": row["pred"], "train_eps": row["train_eps_arg"]}
    settings = ObjectiveSettings(**objective_keys(keys))
    transport = Transport.make(settings, sample_eps=row["sample_eps_arg"])
    ours = {
        "train": transport.training_interval,
        "ode": transport.ode_interval,
        "sde_sigma_last0.04": transport.sde_interval("sigma", last_step=0.04),
        "sde_sigma_last0": transport.sde_interval("sigma", last_step=0.0),
        "sde_SBDM_last0.04": transport.sde_interval("path", last_step=0.04),
    }
    if row["pred"] == "velocity" and row["path"] != "VP":
        del ours["sde_SBDM_last0.04"]  # published, it divides by 0
    for name, interval in ours.items():
        if isinstance(row.get(name), list):
            np.testing.assert_allclose(interval, row[name], rtol=1e-6, err_msg=f"{row} {name}")


class _NumpyRng(LocalRng):
    """Draws from numpy's global generator, as the published code does."""

    def normal(self, num_rows: int, *shape: int) -> Tensor:
        return torch.from_numpy(np.random.standard_normal((num_rows, *shape)))


def _logit_normal(case: Case) -> Outputs:
    config, normals = case.config, case.inputs["normals"]
    num_rows = len(normals)

    def draw(time: LogitNormalTime | Rescaled | Restricted) -> Tensor:
        np.random.seed(config["numpy_seed"])
        return time.draw(num_rows, _NumpyRng(torch.Generator(), 0, 1))

    standard = LogitNormalTime()
    times = {
        "t_mu0": draw(standard),
        "t_mu": draw(LogitNormalTime(config["mu"])),
        "t_range": draw(Restricted(standard, *config["range"])),
        "density_mu0": standard.density(case.inputs["density_grid"]),
    }
    for name in case.outputs:
        if name.startswith("t_noise_pred_eps"):
            eps = float(name.removeprefix("t_noise_pred_eps"))
            times[name] = draw(Rescaled(standard, eps, 1 - eps))
    return times


def _latents(case: Case) -> Outputs:
    given, config = case.inputs, case.config
    statistics = measure_latents(given["latents"])
    keys = statistics_keys(statistics)["autoencoder"]
    settings = AutoencoderSettings(path="", multiplier=config["latent_multiplier"], **keys)
    raw = settings.model_copy(update={"mean": None, "std": None})
    unflipped = per_sample(given["use_unflipped"].float(), given["latents"]) > 0
    latents = torch.where(unflipped, given["latents"], given["latents_flip"])
    items = _normalize(latents, settings if config["latent_norm"] else raw)
    channels = latents.shape[1]
    model = _Keeping(channels)
    autoencoder = KLAutoencoder(model)
    autoencoder.set_statistics(*settings.statistics(channels))
    autoencoder.decode(items)
    return {
        **statistics,
        "items": items,
        "items_nonorm": _normalize(latents, raw),
        "denormalised": model.raw,
        "labels": given["labels"],
    }


def _normalize(latents: Tensor, settings: AutoencoderSettings) -> Tensor:
    """Normalize as training does, from posteriors without spread."""
    moments = {"latent_mean": latents, "latent_logvar": torch.full_like(latents, -torch.inf)}
    posterior = PosteriorLatents(FLOW_MATCHING, *settings.statistics(latents.shape[1]))
    return posterior.sample(moments, torch.zeros_like(latents))


class _Keeping(nn.Module):
    """An autoencoder that keeps the raw latents it is to decode."""

    raw: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            latent_channels=channels,
            latents_mean=None,
            latents_std=None,
            shift_factor=None,
            scaling_factor=1.0,
        )

    def decode(self, latents: Tensor) -> SimpleNamespace:
        self.raw = latents
        return SimpleNamespace(sample=latents[:, :3])


# ---------------------------------------------------------------- sampling

Start = Callable[[Tensor, Callable[[Tensor], Tensor]], Steps]
"""From noise, and what cuts a stored normal to its rows, to a sampler under way."""


def _sample(case: Case, network: nn.Module, start: Start, guidance: Guidance | None) -> Tensor:
    """Sample every row through the step engine; guided cases store the unconditional half too."""
    z, label = case.inputs["z"], case.inputs["y"]
    null = torch.tensor(case.config["num_classes"])
    samplings = [
        Sampling(
            start(z[row], lambda normal, row=row: normal[row]),
            {"label": label[row]},
            {"label": null},
            guidance or Guidance(),
        )
        for row in range(len(z))
    ]
    rows = torch.stack(drive(network, samplings))
    if guidance is None:
        return rows
    steps = start(torch.cat([z, z]), lambda normal: normal)
    labels = torch.cat([label, null.expand(len(z))])
    answer: Tensor | None = None
    try:
        while True:
            query = steps.send(answer)
            answer = _answer_both_halves(network, labels, query.x, query.t, guidance)
    except StopIteration as end:
        return torch.cat([rows, end.value[len(z) :]])


def _guidance(config: dict, mode: str) -> Guidance | None:
    if not mode.startswith("cfg"):
        return None
    interval = guidance_from(config["cfg_interval_start"], 1.0) if mode == "cfg" else None
    return Guidance(config["cfg_scale"], interval, 3)


@torch.no_grad()
def _ode(case: Case) -> Outputs:
    network, config = _network(case), case.config
    return {run["out"]: _ode_run(case, network, run, config) for run in config["runs"]}


def _ode_run(case: Case, network: nn.Module, run: dict, config: dict) -> Tensor:
    start = config["cfg_interval_start"] if run["mode"] == "cfg" else 0.0
    settings = TransportSampling(
        method=METHODS.get(run["method"], run["method"]),
        atol=run["atol"],
        rtol=run["rtol"],
        guidance_interval=(start, 1.0),
    )
    points = run.get("num_steps", config["num_steps"])
    times = even_times((0.0, 1.0), points - 1, shift=_shift(run["timestep_shift"]))
    guidance = _guidance(config, run["mode"])
    first = case.inputs["z"] if guidance is None else torch.cat([case.inputs["z"]] * 2)
    states = [
        _sample(case, network, lambda z, _, end=end: solve_ode(settings, z, times[:end]), guidance)
        for end in range(2, len(times) + 1)
    ]
    return torch.stack([first, *states])


@torch.no_grad()
def _ode_predictions(case: Case) -> Outputs:
    network, config = _network(case), case.config
    settings = TransportSampling(method=METHODS.get(config["method"], config["method"]))
    outputs = {}
    for name in case.outputs:
        path_type, prediction = name.split("/")
        objective = ObjectiveSettings(path=path_type.lower(), prediction=prediction)
        transport = Transport.make(objective, sample_eps=config["eps"])
        shift = _shift(config["timestep_shift"])
        times = even_times(transport.ode_interval, config["num_steps"] - 1, shift=shift)

        def start(z: Tensor, _: Callable, *, end: int, times=times, transport=transport) -> Steps:
            steps = solve_ode(settings, z, times[:end])
            return from_prediction(steps, path=transport.path, prediction=transport.prediction)

        states = [
            _sample(case, network, partial(start, end=end), None)
            for end in range(2, len(times) + 1)
        ]
        outputs[name] = torch.stack([case.inputs["z"], *states])
    return outputs


@torch.no_grad()
def _sde(case: Case) -> Outputs:
    network = _network(case)
    return {run["out"]: _sde_run(case, network, run) for run in case.config["runs"]}


def _sde_run(case: Case, network: nn.Module, run: dict) -> Tensor:
    config = case.config
    settings = TransportSampling(
        method=METHODS[run["method"]],
        diffusion=DIFFUSION_FORMS[run["diffusion_form"]],
        diffusion_norm=run["diffusion_norm"],
        last=LAST_STEPS[run["last_step"]],
    )
    objective = ObjectiveSettings(path=run["path_type"].lower(), prediction=run["prediction"])
    transport = Transport.make(objective, sample_eps=run["eps"])
    last_step = config["last_step_size"] if run["last_step"] else 0.0
    interval = transport.sde_interval(settings.diffusion, last_step=last_step)
    times = even_times(interval, config["num_steps"] - 1, shift=1.0)
    reverse = make_reverse(settings, transport.path)

    def start(z: Tensor, cut: Callable, *, end: int, finish: bool) -> Steps:
        normals: Iterator[Tensor] = (cut(normal) for normal in case.inputs["noise"])
        steps = solve_sde(settings, z, times[:end], reverse=reverse, normals=normals)
        if finish:
            steps = sde.finish(steps, interval[1], make_last_step(settings, reverse))
        return from_prediction(steps, path=transport.path, prediction=transport.prediction)

    guidance = _guidance(config, run["mode"])
    ends = range(2, len(times) + 1)
    states = [
        _sample(case, network, partial(start, end=end, finish=False), guidance) for end in ends
    ]
    last = partial(start, end=len(times), finish=run["last_step"] is not None)
    return torch.stack([*states, _sample(case, network, last, guidance)])


RUNNERS = {
    "dit_forward_with_cfg": _forward_with_cfg,
    "dit_fwd_learn_sigma": _forward,
    "dit_fwd_no_classdrop": _forward,
    "dit_fwd_qknorm_layernorm": _forward,
    "dit_fwd_qknorm_rms_woshift": _forward,
    "dit_fwd_release": _forward,
    "dit_fwd_vanilla": _forward,
    "dit_helpers": _helpers,
    "dit_train_loss_cos": _train_loss,
    "dit_train_loss_plain": _train_loss,
    "dit_train_steps": _train_steps,
    "latent_dataset": _latents,
    "sampler_ode": _ode,
    "sampler_ode_predictions": _ode_predictions,
    "sampler_sde": _sde,
    "transport_intervals_timeshift": _intervals,
    "transport_logit_normal": _logit_normal,
    "transport_losses_gvp": _losses,
    "transport_losses_linear": _losses,
    "transport_losses_vp": _losses,
    "transport_path_gvp": _path,
    "transport_path_linear": _path,
    "transport_path_vp": _path,
    **lightningdit_tokenizer.RUNNERS,
}
