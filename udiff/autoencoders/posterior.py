"""Training on cached moments: every visit of a picture samples its latent anew."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from udiff.autoencoders.kl import Moments
from udiff.system import Batch, Draws, Losses, StepRng


@runtime_checkable
class LatentObjective(Protocol):
    """An objective that reads `batch["latent"]`."""

    def draw(self, batch: Batch, rng: StepRng) -> Draws: ...  # noqa: D102
    def __call__(self, network: nn.Module, batch: Batch, draws: Draws) -> Losses: ...  # noqa: D102


@dataclass(frozen=True)
class PosteriorLatents:
    """Sample latents from cached moments, normalize them, and hand them to an objective."""

    objective: LatentObjective
    mean: tuple[float, ...]
    """Per channel, of raw latents."""
    std: tuple[float, ...]

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw the posterior's noise, then what the objective draws."""
        shape = batch["latent_mean"].shape
        noise = rng.local.normal(*shape)
        return {"posterior_noise": noise, **self.objective.draw({**batch, "latent": noise}, rng)}

    def __call__(self, network: nn.Module, batch: Batch, draws: Draws) -> Losses:
        """Compute the objective's loss on sampled latents."""
        latent = self.sample(batch, draws["posterior_noise"])
        return self.objective(network, {**batch, "latent": latent}, draws)

    def sample(self, batch: Batch, noise: Tensor) -> Tensor:
        """Sample normalized latents, in float32 whatever the cache's dtype."""
        moments = Moments(batch["latent_mean"].float(), batch["latent_logvar"].float())
        mean, std = (
            torch.tensor(values, device=noise.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (moments.sample(noise) - mean) / std
