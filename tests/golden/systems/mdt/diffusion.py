"""Reference cases of schedules, losses without a network, and timestep samplers."""

import torch
from torch import Tensor

from tests.golden.case import Case, Outputs
from udiff.diffusion.conditions import LabelDropout
from udiff.diffusion.gaussian import (
    NoiseSchedule,
    cosine_betas,
    linear_betas,
    spaced_timesteps,
)
from udiff.diffusion.gaussian_loss import (
    GaussianObjective,
    Noised,
    SquaredError,
    VariationalBound,
    prior_bits,
)
from udiff.diffusion.gaussian_reverse import (
    DataPrediction,
    FixedLarge,
    FixedSmall,
    LearnedRange,
    NoisePrediction,
    ReverseProcess,
)
from udiff.diffusion.timesteps import LossSecondMoment, UniformTimesteps
from udiff.system import Prediction

SCHEDULE = NoiseSchedule.of(linear_betas(1000))
BETAS = {"linear": linear_betas, "squaredcos_cap_v2": cosine_betas}


def schedules(case: Case) -> Outputs:
    found: dict[str, Tensor] = {}
    for name in case.outputs:
        if not name.startswith(("respace", "minsnr")):
            table, kind, num_steps = name.split(".")
            found[name] = _table(NoiseSchedule.of(BETAS[kind](int(num_steps))), table)
    for name, spacing in case.config["respacings"].items():
        timesteps = spaced_timesteps(1000, spacing)
        spaced = SCHEDULE.spaced(timesteps)
        found[f"{name}.timestep_map"] = torch.tensor(timesteps)
        for table in ("betas", "posterior_log_variance_clipped"):
            found[f"{name}.{table}"] = _table(spaced, table)
    at = SCHEDULE.at(case.inputs["t"], torch.zeros(1))
    snr = (at.alpha / at.sigma).square()
    found["minsnr_weight_eps"] = NoisePrediction().snr_weight(snr, 5.0)
    found["minsnr_weight_x0"] = DataPrediction().snr_weight(snr, 5.0)
    return found


def _table(schedule: NoiseSchedule, name: str) -> Tensor:
    table = schedule.table
    tables = {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alpha_bar,
        "alphas_cumprod_prev": schedule.alpha_bar_previous,
        "alphas_cumprod_next": torch.cat([schedule.alpha_bar[1:], torch.zeros(1)]),
        "posterior_variance": schedule.posterior_variance,
        "posterior_log_variance_clipped": table.posterior_logvar,
        "posterior_mean_coef1": table.data_coef,
        "posterior_mean_coef2": table.x_t_coef,
        "sqrt_alphas_cumprod": table.alpha,
        "sqrt_one_minus_alphas_cumprod": table.sigma,
        "sqrt_recip_alphas_cumprod": table.recip_alpha,
        "sqrt_recipm1_alphas_cumprod": table.recip_ratio,
    }
    return tables[name]


def gaussian_losses(case: Case) -> Outputs:
    found: dict[str, Tensor] = {}
    for number, setting in enumerate(case.config["settings"]):
        outputs = _losses(case, setting)
        found |= {f"c{number}.{name}": value for name, value in outputs.items()}
    return found


def _losses(case: Case, setting: dict) -> dict[str, Tensor]:
    given, num_steps = case.inputs, case.config["diffusion_steps"]
    data, noise, t = given["x_start"], given["noise"], given["t"]
    process = _process(setting, num_steps)
    learned = setting.get("learn_sigma", True)
    output = given["model_output"] if learned else given["model_output"][:, : data.shape[1]]
    x_t = process.schedule.add_noise(data, noise, t)
    found = {"x_t": x_t, "prior_bpd": prior_bits(process.schedule, data)}
    for name, clip in (("clip0", None), ("clip1", 1.0)):
        reverse = process(output, x_t, t, clip=clip)
        found[f"{name}.mean"], found[f"{name}.pred_xstart"] = reverse.mean, reverse.data_pred
        found[f"{name}.log_variance"] = reverse.logvar.expand_as(data)
    noised = Noised(data, noise, x_t, t)
    found["vb_terms"] = VariationalBound()(process, output, noised)
    objective = GaussianObjective(
        process, UniformTimesteps(num_steps), LabelDropout(1, 0.0), _terms(setting, num_steps)
    )
    draws = {"timestep": t, "noise": noise, "label": torch.zeros_like(t)}
    ask = lambda *_, **__: Prediction(output)  # noqa: E731
    batch = {"latent": data}
    found |= objective.compute_terms(ask, batch, draws)
    return {**found, "loss": objective(ask, batch, draws).per_sample}


def _process(setting: dict, num_steps: int) -> ReverseProcess:
    betas = BETAS[setting.get("noise_schedule", "linear")](num_steps)
    fixed = FixedSmall() if setting.get("sigma_small") else FixedLarge()
    return ReverseProcess(
        NoiseSchedule.of(betas),
        DataPrediction() if setting.get("predict_xstart") else NoisePrediction(),
        LearnedRange() if setting.get("learn_sigma", True) else fixed,
    )


def _terms(setting: dict, num_steps: int) -> dict:
    if setting.get("use_kl"):
        return {"vb": VariationalBound(weight=float(num_steps), learns_mean=True)}
    terms: dict = {"mse": SquaredError(5.0)}
    if setting.get("learn_sigma", True):
        rescaled = setting.get("rescale_learned_sigmas", False)
        terms["vb"] = VariationalBound(weight=num_steps / 1000 if rescaled else 1.0)
    return terms


def second_moment(case: Case) -> Outputs:
    config, given = case.config, case.inputs
    sampler = LossSecondMoment(
        config["T"], history=config["history_per_term"], uniform_prob=config["uniform_prob"]
    )
    cold = sampler.weights()
    sampler.record(given["ts"], given["losses"])
    return {
        "weights_cold": cold,
        "weights": sampler.weights(),
        "is_weights": sampler.importance(),
    }
