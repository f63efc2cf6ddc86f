"""Ancestral sampling (DDPM, arXiv 2006.11239, algorithm 2)."""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from udiff.diffusion.gaussian_reverse import ReverseProcess
from udiff.system import Query, Steps


def ddpm(
    noise: Float[Tensor, "..."],
    process: ReverseProcess,
    *,
    normals: Iterator[Float[Tensor, "..."]],
    clip: float | None = None,
) -> Steps:
    """Draw x_{t-1} from p(x_{t-1} | x_t), step by step; one query a step, with its timestep.

    Args:
        noise: x at the process's last step, unit variance.
        process: spaced to the steps that are to be visited; it reads the guided answers.
        normals: one standard normal for every step but the last, shaped like x.
        clip: largest magnitude of a data prediction.
    """
    x = noise
    for step in reversed(range(len(process.schedule))):
        output = yield Query(x, float(process.schedule.timesteps[step]))
        reverse = process(output, x, step, clip=clip)
        x = reverse.mean
        if step:  # the last step adds none
            x = x + (0.5 * reverse.logvar).exp() * next(normals)
    return x
