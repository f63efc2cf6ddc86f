"""The game of autoencoder and discriminator (arXiv 2012.09841, equation 6)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from udiff.models.vavae.objective import RECONSTRUCTION, Attempt
from udiff.models.vavae.weight import LossWeight, differentiate_once
from udiff.system import Batch, Draws, Losses, StepRng

Logits = Float[Tensor, "batch 1 rows columns"]
DiscriminatorLoss = Callable[[Logits, Logits], Float[Tensor, ""]]
"""Of the logits of real pictures and of reconstructions."""


def hinge_loss(real: Logits, fake: Logits) -> Float[Tensor, ""]:
    """Ask for logits above 1 of real pictures, and below -1 of others."""
    return 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())


def vanilla_loss(real: Logits, fake: Logits) -> Float[Tensor, ""]:
    """Compute the cross entropy (arXiv 1406.2661)."""
    return 0.5 * (softplus(-real).mean() + softplus(fake).mean())


@dataclass(frozen=True)
class Adversarial:
    """Reconstructions that the discriminator takes for real.

    Before its start the loss is computed, and multiplied by 0, as published: so batch norm has seen
    pictures, and every parameter has a gradient.
    """

    discriminator: nn.Module
    weight: LossWeight
    start: int
    """First step that counts."""
    factor: float = 1.0

    def __call__(self, attempt: Attempt) -> Losses:
        """Compute the autoencoder's part, balanced at the decoder's last layer."""
        pixels = attempt.reconstruction.pixels
        loss = differentiate_once(-self.discriminator(pixels).mean(), pixels)
        weight = self.weight(attempt.nll, loss, attempt.layers.decoder)
        factor = started(attempt.step, self.start, self.factor, like=loss)
        return Losses(
            weight * factor * loss,
            {"adversarial": loss, "adversarial_weight": weight, "adversarial_factor": factor},
        )


@dataclass(frozen=True)
class DiscriminatorObjective:
    """Tell pictures from the reconstructions that the same step's generator phase made of them."""

    loss: DiscriminatorLoss
    start: int
    """First step that counts."""
    factor: float = 1.0

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw nothing; pass the step on."""
        return {"step": torch.tensor(float(rng.step))}

    def __call__(self, discriminator: nn.Module, batch: Batch, draws: Draws) -> Losses:
        """Compute the loss; real and generated pictures are batches of their own."""
        real, fake = discriminator(batch["pixels"]), discriminator(batch[RECONSTRUCTION])
        factor = started(draws["step"], self.start, self.factor, like=real)
        total = factor * self.loss(real, fake)
        return Losses(total, {"logits_real": real.mean(), "logits_fake": fake.mean()})


def started(step: Tensor, start: int, factor: float, *, like: Tensor) -> Float[Tensor, ""]:
    """Give `factor` from step `start` on, and 0 before."""
    return like.new_tensor(factor) * (step >= start).to(like.device)
