"""Implicit sampling (DDIM, arXiv 2010.02502)."""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.gaussian_reverse import ReverseProcess
from udiff.system import Query, Steps


def ddim(
    noise: Float[Tensor, "..."],
    process: ReverseProcess,
    *,
    normals: Iterator[Float[Tensor, "..."]],
    eta: float = 0.0,
    clip: float | None = None,
    temperature: float = 1.0,
    final_alpha_bar: float = 1.0,
) -> Steps:
    """Step towards the predicted data, keeping the predicted noise (equation 12); a query a step.

    Args:
        noise: x at the process's last step, unit variance.
        process: spaced to the steps that are to be visited; it reads the guided answers.
        normals: one standard normal for every step that adds noise, shaped like x: all but the last
            (all, where `final_alpha_bar` is below 1); none if `eta` is 0.
        eta: how much of the predicted noise is replaced by fresh noise; 0 is an ODE, 1 is DDPM.
        clip: largest magnitude of a data prediction; the noise follows from it.
        temperature: factor of the fresh noise.
        final_alpha_bar: variance of the data left in what is returned; 1 is the data prediction.
    """
    x, schedule = noise, process.schedule
    for step in reversed(range(len(schedule))):
        output = yield Query(x, float(schedule.timesteps[step]))
        data_pred = process(output, x, step, clip=clip).data_pred
        at = schedule.at(step, x)
        noise_pred = (at.recip_alpha * x - data_pred) / at.recip_ratio
        bar = schedule.alpha_bar[step]
        previous = schedule.alpha_bar_previous[step] if step else bar.new_tensor(final_alpha_bar)
        sigma = eta * ((1 - previous) / (1 - bar) * (1 - bar / previous)).sqrt()
        x = previous.sqrt() * data_pred + (1 - previous - sigma**2).sqrt() * noise_pred
        if sigma > 0:
            x = x + temperature * sigma * next(normals)
    return x
