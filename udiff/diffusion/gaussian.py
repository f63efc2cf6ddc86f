"""Gaussian diffusion in discrete steps (DDPM, arXiv 2006.11239): schedules and the forward process.

`step` counts the steps of a schedule, 0 = least noise. `timestep` is the same step's number in the
schedule that a network was trained on, which is what the network is given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def linear_betas(num_steps: int) -> Float[Tensor, " steps"]:
    """Rise linearly; any number of steps adds as much noise in all as DDPM's 1,000."""
    scale = 1000 / num_steps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64)


def cosine_betas(num_steps: int) -> Float[Tensor, " steps"]:
    """Make alpha_bar a squared cosine; no beta above 0.999 (arXiv 2102.09672, equation 17)."""
    time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bar = ((time + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(0.999)


class StepTable(NamedTuple):
    """What the algebra needs of a step: a number, or a column of them to multiply a batch with."""

    alpha: Tensor
    """Of the data in x_t, sqrt(alpha_bar)."""
    sigma: Tensor
    """Of the noise in x_t, sqrt(1 - alpha_bar)."""
    recip_alpha: Tensor
    """sqrt(1 / alpha_bar)."""
    recip_ratio: Tensor
    """sqrt(1 / alpha_bar - 1) = sigma / alpha."""
    data_coef: Tensor
    """Of the data in the mean of q(x_{t-1} | x_t, data)."""
    x_t_coef: Tensor
    """Of x_t in the mean of q(x_{t-1} | x_t, data)."""
    posterior_logvar: Tensor
    """Of q(x_{t-1} | x_t, data); step 0, whose variance is 0, has that of step 1."""
    log_beta: Tensor
    large_logvar: Tensor
    """log beta, but at step 0 the posterior's."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Noise variance of every step; all tables are float64."""

    betas: Float[Tensor, " steps"]
    timesteps: Int[Tensor, " steps"]
    """Numbers of the steps in the schedule that the network was trained on."""

    @classmethod
    def of(cls, betas: Float[Tensor, " steps"]) -> "NoiseSchedule":
        """Make the schedule of a training, where steps and timesteps are the same."""
        return cls(betas, torch.arange(len(betas)))

    def spaced(self, timesteps: Sequence[int]) -> "NoiseSchedule":
        """Keep some steps; x_t has the same distribution there as before."""
        kept = torch.tensor(timesteps)
        alpha_bar = self.alpha_bar[kept]
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        return NoiseSchedule(1 - alpha_bar / previous, self.timesteps[kept])

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alpha_bar(self) -> Float[Tensor, " steps"]:
        """Variance of the data left in x_t."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def alpha_bar_previous(self) -> Float[Tensor, " steps"]:
        """`alpha_bar` one step nearer to the data."""
        return torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])

    @cached_property
    def posterior_variance(self) -> Float[Tensor, " steps"]:
        """Variance of q(x_{t-1} | x_t, data), arXiv 2006.11239, equation 7."""
        return self.betas * (1 - self.alpha_bar_previous) / (1 - self.alpha_bar)

    @cached_property
    def table(self) -> StepTable:
        """Everything of every step."""
        bar, previous, beta = self.alpha_bar, self.alpha_bar_previous, self.betas
        second = min(1, len(self) - 1)
        first = self.posterior_variance[second : second + 1]
        variance = torch.cat([first, self.posterior_variance[1:]])
        return StepTable(
            alpha=bar.sqrt(),
            sigma=(1 - bar).sqrt(),
            recip_alpha=(1 / bar).sqrt(),
            recip_ratio=(1 / bar - 1).sqrt(),
            data_coef=beta * previous.sqrt() / (1 - bar),
            x_t_coef=(1 - previous) * (1 - beta).sqrt() / (1 - bar),
            posterior_logvar=variance.log(),
            log_beta=beta.log(),
            large_logvar=torch.cat([variance[:1], beta[1:]]).log(),
        )

    def at(self, step: int | Int[Tensor, " batch"], like: Float[Tensor, "..."]) -> StepTable:
        """Look up one step (float64), or one for each sample of a batch shaped `like` (float32)."""
        if isinstance(step, int):
            return StepTable(*(column[step] for column in self.table))
        rows = torch.stack(self.table).to(like.device)[:, step].float()
        return StepTable(*rows.view(*rows.shape, *[1] * (like.ndim - 1)))

    def add_noise(
        self,
        data: Float[Tensor, "batch ..."],
        noise: Float[Tensor, "batch ..."],
        step: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch ..."]:
        """Draw x_t = alpha data + sigma noise (arXiv 2006.11239, equation 4)."""
        at = self.at(step, data)
        return at.alpha * data + at.sigma * noise


def spaced_timesteps(num_steps: int, spacing: str) -> list[int]:
    """Choose the steps that sampling visits, in increasing order.

    Args:
        num_steps: of the schedule trained on.
        spacing: "250" spreads 250 steps evenly; "10,20,30" does so in each of three equal parts,
            least noise first; "ddim50" takes the smallest whole stride that gives 50; "" takes all.

    Raises:
        ValueError: there are no such steps.
    """
    if spacing.startswith("ddim"):
        return _strided(num_steps, int(spacing.removeprefix("ddim")))
    counts = [int(count) for count in spacing.split(",")] if spacing else [num_steps]
    size, rest = divmod(num_steps, len(counts))
    steps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < rest)
        if not 0 <= count <= length:
            raise ValueError(f"spacing {spacing!r} asks for {count} steps out of {length}")
        steps += [start + step for step in _spread(length, count)]
        start += length
    return steps


def _spread(length: int, count: int) -> list[int]:
    stride = (length - 1) / (count - 1) if count > 1 else 1.0
    steps, position = [], 0.0
    for _ in range(count):
        steps.append(round(position))
        position += stride  # added up, not multiplied, as officially: rounding depends on it
    return steps


def _strided(num_steps: int, count: int) -> list[int]:
    for stride in range(1, num_steps):
        if len(range(0, num_steps, stride)) == count:
            return list(range(0, num_steps, stride))
    raise ValueError(f"no whole stride takes exactly {count} of {num_steps} steps")
