"""Reference cases of losses, gradients and optimizer steps."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from tests.golden.case import Case, Outputs
from tests.golden.systems.mdt.network import build_network, forward, forward_masked, mask_ratio
from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.gaussian import (
    NoiseSchedule,
    linear_betas,
)
from udiff.diffusion.gaussian_loss import (
    GaussianObjective,
    SquaredError,
    VariationalBound,
)
from udiff.diffusion.gaussian_reverse import (
    LearnedRange,
    NoisePrediction,
    ReverseProcess,
)
from udiff.diffusion.masked_pass import (
    MaskedPass,
    num_kept,
)
from udiff.diffusion.timesteps import UniformTimesteps
from udiff.models.mdtv2.network import MaskedTransformer
from udiff.nn.token_mask import kept_tokens
from udiff.settings import AdanSettings, EmaSettings
from udiff.system import Draws
from udiff.training.ema import Ema
from udiff.training.optimizer import clip_gradients, make_optimizer
from udiff.weights import strip_prefix

SCHEDULE = NoiseSchedule.of(linear_betas(1000))
PROCESS = ReverseProcess(SCHEDULE, NoisePrediction(), LearnedRange())


def _objective(case: Case, num_tokens: int) -> MaskedPass:
    cap = None if case.kind == "mdt_v1" else 5.0
    dropout = LabelDropout(case.config["num_classes"], case.config.get("class_dropout_prob", 0.1))
    terms = {"mse": SquaredError(cap), "vb": VariationalBound()}
    plain = GaussianObjective(PROCESS, UniformTimesteps(1000), dropout, terms)
    return MaskedPass(plain, mask_ratio(case), num_tokens, ("timestep",))


def _draws(case: Case, objective: MaskedPass, prefix: str, drop: str, label: Tensor) -> Draws:
    """Name the recorded draws as the objective draws them."""
    given = strip_prefix(case.inputs, prefix)
    ratio = objective.ratio.draw(torch.Generator())
    if "mask_rand" in given:
        ratio = objective.ratio.at(given["mask_rand"][0])
    conditions = objective.objective.conditions
    return {
        "timestep": given["t"],
        "noise": given["noise_unmasked"],
        "masked_noise": given["noise_masked"],
        "label": conditions.drop(label, given[f"{drop}_unmasked"]),
        "masked_label": conditions.drop(label, given[f"{drop}_masked"]),
        "mask_ratio": ratio,
        "mask_noise": given["mask_noise"],
    }


def train_loss(case: Case, prefix: str = "") -> Outputs:
    network, given = build_network(case).train(), strip_prefix(case.inputs, prefix)
    objective = _objective(case, given["mask_noise"].shape[1])
    draws = _draws(case, objective, prefix, "label_drop_rand", given["y"])
    batch = {"latent": given["x0"]}
    losses = objective(network, batch, draws)
    losses.total.backward()
    parameters = dict(network.named_parameters())
    norm = nn.utils.get_total_norm([p.grad.double() for p in parameters.values()])
    at = SCHEDULE.at(given["t"], given["x0"])
    found = {
        "loss": losses.total,
        "grad_norm": norm,
        "x_t_unmasked": SCHEDULE.add_noise(given["x0"], draws["noise"], given["t"]),
        "vb_weight_free_check_snr": (at.alpha / at.sigma).square().flatten(),
    }
    gradients = {f"grad/{name}": p.grad for name, p in parameters.items()}
    return {**found, **gradients, **_branches(network, objective, batch, draws)}


def _branches(
    network: MaskedTransformer, objective: MaskedPass, batch: Draws, draws: Draws
) -> dict[str, Tensor]:
    keep = kept_tokens(draws["mask_noise"], num_kept(objective.num_tokens, draws["mask_ratio"]))
    masked = strip_prefix(draws, "masked_")
    asked = {
        "unmasked": (network, draws),
        "masked": (partial(network, keep=keep), {**draws, **masked}),
    }
    found = {}
    for name, (ask, drawn) in asked.items():
        terms = objective.objective.compute_terms(ask, batch, drawn)
        found |= {f"{name}.{term}": value for term, value in terms.items()}
        found[f"{name}.loss"] = objective.objective(ask, batch, drawn).per_sample
    return found


def train_steps(case: Case) -> Outputs:
    network, config = build_network(case).train(), case.config
    settings = AdanSettings(
        name="adan",
        lr=config["lr"],
        betas=tuple(config["betas"]),
        eps=config["eps"],
        weight_decay=config["weight_decay"],
        clip_norm=config["max_grad_norm"] or None,
    )
    optimizer = make_optimizer([network], settings)
    emas = [Ema({"": network}, EmaSettings(decay=rate)) for rate in config["ema_rate"]]
    found: dict[str, Tensor] = {}
    steps = sorted({int(key[4 : key.index(".")]) for key in case.inputs if key.startswith("step")})
    for step in steps:
        found[f"step{step}.losses"] = torch.cat(list(_backward(case, network, step)))
        norm = clip_gradients(optimizer, settings.clip_norm)
        found[f"step{step}.grad_norm"] = norm.double()
        optimizer.step()
        network.zero_grad()
        for ema in emas:
            ema.update(step)
        annealed = config["lr"]
        if config["lr_anneal_steps"]:
            annealed *= 1 - step / config["lr_anneal_steps"]
        optimizer.param_groups[0]["lr"] = annealed
        found[f"step{step}.lr_after"] = torch.tensor(annealed, dtype=torch.float64)
    found |= {f"param/{name}": p for name, p in network.named_parameters()}
    for number, ema in enumerate(emas):
        found |= {f"ema{number}/{key[1:]}": value for key, value in ema.averages.items()}
    return {**found, **_distance(case, network)}


def _backward(case: Case, network: MaskedTransformer, step: int) -> Iterator[Tensor]:
    """Add up the gradients of micro-batches: the published code does not divide by their number."""
    given = case.inputs
    size = len(given[f"step{step}.micro0.t"])
    for micro in range(len(given[f"step{step}.y"]) // size):
        rows = slice(micro * size, (micro + 1) * size)
        prefix = f"step{step}.micro{micro}."
        objective = _objective(case, given[f"{prefix}mask_noise"].shape[1])
        draws = _draws(case, objective, prefix, "drop", given[f"step{step}.y"][rows])
        batch = {"latent": given[f"step{step}.x0"][rows]}
        objective(network, batch, draws).total.backward()
        branches = _branches(network, objective, batch, draws)
        yield branches["unmasked.loss"].detach()
        yield branches["masked.loss"].detach()


def _distance(case: Case, network: MaskedTransformer) -> dict[str, Tensor]:
    with torch.no_grad():
        parameters = {name: p.double() for name, p in network.named_parameters()}
        changes = [p - case.weights[name].double() for name, p in parameters.items()]
    return {
        "param_l2": nn.utils.get_total_norm(list(parameters.values())),
        "param_delta_l2": nn.utils.get_total_norm(changes),
    }


def mdt_v1(case: Case) -> Outputs:
    plain, masked = forward(case), forward_masked(case)
    sides = {"side_in": masked["side_in"], "side_block": masked["sideblocks.0"]}
    trained = train_loss(case, "train.")
    return {**plain, **sides, "output_masked": masked["output"], **trained}


def adan(case: Case) -> Outputs:
    found: dict[str, Tensor] = {}
    names = sorted(key for key in case.inputs if key.startswith("p"))
    steps = sorted({int(key[4 : key.index(".")]) for key in case.inputs if key.startswith("grad")})
    for number, setting in enumerate(case.config["settings"]):
        values = dict(setting)
        clip = values.pop("max_grad_norm", 0.0) or None
        proximal = not values.pop("no_prox", False)
        settings = AdanSettings(name="adan", proximal=proximal, clip_norm=clip, **values)
        module = nn.ParameterDict({name: case.inputs[name].clone() for name in names})
        optimizer = make_optimizer([module], settings)
        for step in steps:
            for name in names:
                module[name].grad = case.inputs[f"grad{step}.{name}"].clone()
            clip_gradients(optimizer, settings.clip_norm)
            optimizer.step()
            found |= {f"c{number}.step{step}.{k}": p.detach().clone() for k, p in module.items()}
        for name, parameter in module.items():
            states = optimizer.state[parameter]
            found |= {f"c{number}.final.{key}.{name}": state for key, state in states.items()}
    return found
