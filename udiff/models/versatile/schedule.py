"""The noise schedule, and which of its steps sampling visits."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.gaussian import NoiseSchedule, cosine_betas

NUM_TIMESTEPS = 1000
BETAS = (0.00085, 0.012)
"""First and last; the paper's text says 8.5e-5, the released weights were trained with these."""
Spacing = Literal["uniform", "quadratic"]
BetaRule = Literal["linear", "cosine", "sqrt_linear", "sqrt"]


def make_betas(
    rule: BetaRule, num_steps: int, *, first: float, last: float
) -> Float[Tensor, " steps"]:
    """Compute the noise variances of all steps, under the official names of the rules.

    "linear" is linear in their square roots.
    """
    match rule:
        case "linear":
            return torch.linspace(first**0.5, last**0.5, num_steps, dtype=torch.float64).square()
        case "cosine":
            return cosine_betas(num_steps)
        case "sqrt_linear":
            return torch.linspace(first, last, num_steps, dtype=torch.float64)
        case "sqrt":
            return torch.linspace(first, last, num_steps, dtype=torch.float64).sqrt()


def make_schedule(
    betas: tuple[float, float] = BETAS, *, num_timesteps: int = NUM_TIMESTEPS
) -> NoiseSchedule:
    """Make the schedule that the networks are trained on."""
    return NoiseSchedule.of(make_betas("linear", num_timesteps, first=betas[0], last=betas[1]))


def sampling_timesteps(
    num_steps: int, spacing: Spacing = "uniform", *, num_timesteps: int = NUM_TIMESTEPS
) -> list[int]:
    """Choose the timesteps that sampling visits, in increasing order.

    As officially they are one higher than evenly spaced ones, and "uniform" may visit more than
    `num_steps`, since its stride is whole. The official code fails where the last would be 1,000
    (3, 9, 1,000 steps and others); here it is 999 then.

    Raises:
        ValueError: there are no such steps.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps must be in 1..{num_timesteps}, got {num_steps}")
    if spacing == "quadratic":
        roots = torch.linspace(0, (0.8 * num_timesteps) ** 0.5, num_steps, dtype=torch.float64)
        return [int(root) + 1 for root in roots.square().tolist()]
    steps = range(0, num_timesteps, num_timesteps // num_steps)
    return sorted({min(step + 1, num_timesteps - 1) for step in steps})


def bound_weights(schedule: NoiseSchedule) -> Float[Tensor, " steps"]:
    """Compute the weights that turn errors of the noise into terms of the variational bound.

    beta^2 / (2 posterior_variance (1 - beta) (1 - alpha_bar)), arXiv 2006.11239, equation 12; the
    first, which would be infinite, is the second's.
    """
    # In float32, as officially: it shows in 1 - alpha_bar.
    beta, variance = schedule.betas.float(), schedule.posterior_variance.float()
    kept = (1 - schedule.betas).float() * (1 - schedule.alpha_bar.float())
    weights = beta.square() / (2 * variance * kept)
    return torch.cat([weights[1:2], weights[1:]])


def official_buffers(schedule: NoiseSchedule) -> dict[str, Float[Tensor, " steps"]]:
    """Make the 12 tables that official checkpoints hold beside the weights, float32."""
    bar, table = schedule.alpha_bar, schedule.table
    buffers = {
        "betas": schedule.betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": schedule.alpha_bar_previous,
        "sqrt_alphas_cumprod": table.alpha,
        "sqrt_one_minus_alphas_cumprod": table.sigma,
        "log_one_minus_alphas_cumprod": (1 - bar).log(),
        "sqrt_recip_alphas_cumprod": table.recip_alpha,
        "sqrt_recipm1_alphas_cumprod": table.recip_ratio,
        "posterior_variance": schedule.posterior_variance,
        "posterior_log_variance_clipped": schedule.posterior_variance.clamp_min(1e-20).log(),
        "posterior_mean_coef1": table.data_coef,
        "posterior_mean_coef2": table.x_t_coef,
    }
    return {name: values.float() for name, values in buffers.items()}
