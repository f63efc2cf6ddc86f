"""Reconstruction with a KL penalty."""

from dataclasses import dataclass

from torch import nn

from udiff.autoencoders.kl import Reconstruction
from udiff.autoencoders.pixels import to_pixels
from udiff.system import Batch, Draws, Losses, StepRng


@dataclass(frozen=True)
class ReconstructionKL:
    """Mean absolute error of the pixels plus `kl_weight` times the KL per latent element."""

    kl_weight: float
    latent_channels: int
    downscale: int

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw the posterior's noise."""
        rows, height, width, _ = batch["image"].shape
        shape = (self.latent_channels, height // self.downscale, width // self.downscale)
        return {"noise": rng.local.normal(rows, *shape)}

    def __call__(self, autoencoder: nn.Module, batch: Batch, draws: Draws) -> Losses:
        """Compute the loss of `batch["image"]`, uint8."""
        pixels = to_pixels(batch["image"])
        reconstruction: Reconstruction = autoencoder(pixels, draws["noise"])
        l1 = (reconstruction.pixels - pixels).abs().mean()
        kl = reconstruction.moments.kl()
        return Losses(total=l1 + self.kl_weight * kl, terms={"l1": l1, "kl": kl})
