"""Which timesteps a training step sees."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from udiff.diffusion.objective import Network, Objective
from udiff.system import Batch, Draws, LocalRng, Losses, StepRng


@runtime_checkable
class TimestepDistribution(Protocol):
    """Draws one timestep per sample."""

    def draw(self, num_rows: int, rng: LocalRng) -> Int[Tensor, " batch"]: ...  # noqa: D102


@dataclass(frozen=True)
class UniformTimesteps:
    """All timesteps alike."""

    num_steps: int

    def draw(self, num_rows: int, rng: LocalRng) -> Int[Tensor, " batch"]:
        """Draw from 0 to `num_steps - 1`."""
        return (rng.uniform(num_rows) * self.num_steps).long()


class LossSecondMoment(nn.Module):
    """Timesteps with large losses more often (arXiv 2102.09672, section 3.3).

    In proportion to the root mean square of the latest losses; all alike until every timestep has
    its `history` of them. A module, so that checkpoints hold what it has seen.
    """

    def __init__(self, num_steps: int, *, history: int = 10, uniform_prob: float = 0.001) -> None:
        super().__init__()
        self.uniform_prob = uniform_prob
        self.register_buffer("losses", torch.zeros(num_steps, history, dtype=torch.float64))
        self.register_buffer("num_losses", torch.zeros(num_steps, dtype=torch.int64))
        self.losses: Tensor
        self.num_losses: Tensor

    def weights(self) -> Float64[Tensor, " steps"]:
        """Compute how often each timestep is drawn, not normalized."""
        num_steps, history = self.losses.shape
        if (self.num_losses < history).any():
            return torch.ones_like(self.losses[:, 0])
        root = self.losses.square().mean(1).sqrt()
        return (1 - self.uniform_prob) * root / root.sum() + self.uniform_prob / num_steps

    def importance(self) -> Float64[Tensor, " steps"]:
        """Compute the weights that keep the expected loss that of uniform timesteps."""
        weights = self.weights()
        return weights.sum() / (weights * len(weights))

    def choose(self, uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Turn uniform numbers in [0, 1) into timesteps."""
        cumulative = self.weights().cumsum(0)
        timestep = torch.searchsorted(cumulative, uniform.double() * cumulative[-1], right=True)
        return timestep.clamp_max(len(cumulative) - 1)

    @torch.no_grad()
    def record(self, timestep: Int[Tensor, " batch"], loss: Float[Tensor, " batch"]) -> None:
        """Take losses in, one after another; a timestep's oldest gives way."""
        history = self.losses.shape[1]
        for index, value in zip(timestep.tolist(), loss.tolist(), strict=True):
            self.losses[index, int(self.num_losses[index]) % history] = value
            self.num_losses[index] += 1


@dataclass(frozen=True)
class ImportanceSampled:
    """An objective whose timesteps a `LossSecondMoment` draws; it learns from all ranks' losses."""

    objective: Objective
    timesteps: LossSecondMoment

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw as the objective does, but for the timestep."""
        draws = self.objective.draw(batch, rng)
        timestep = self.timesteps.choose(rng.local.uniform(len(draws["timestep"])))
        importance = self.timesteps.importance()[timestep].float()
        return {**draws, "timestep": timestep, "importance": importance}

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the loss of each sample times its weight, and remember it without."""
        losses = self.objective(network, batch, draws)
        if losses.per_sample is None:
            raise TypeError("importance sampling needs an objective that says each sample's loss")
        self.timesteps.record(
            _of_all_ranks(draws["timestep"]), _of_all_ranks(losses.per_sample.detach())
        )
        weighted = draws["importance"] * losses.per_sample
        return Losses(weighted.mean(), losses.terms, weighted)


def _of_all_ranks(rows: Tensor) -> Tensor:
    """Gather the rows of the global batch, in its order: rank r of n has r, r + n, r + 2n, ..."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1).flatten()
