"""What the autoencoder minimizes: reconstruction and KL, and losses balanced against it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from udiff.autoencoders.kl import KLAutoencoder, Moments, Reconstruction
from udiff.models.vavae.weight import differentiate_once
from udiff.system import Batch, Draws, Losses, StepRng

Pixels = Float[Tensor, "batch 3 height width"]
Scalar = Float[Tensor, ""]
Bound = Callable[[Pixels, Moments], tuple[Scalar, Scalar]]
"""Reduces the error of every pixel, and the posterior, to the two parts of the bound."""
Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distance of pictures, batch x 1 x 1 x 1."""

RECONSTRUCTION = "reconstruction"
"""What the generator hands on to the discriminator."""


class LastLayers(NamedTuple):
    """Weights at which losses are balanced.

    Taken between the forward pass and the first gradient: then FSDP holds them whole, and they are
    in the graph. Any backward pass, of one loss alone too, ends with FSDP putting shards in their
    place.
    """

    encoder: Tensor
    decoder: Tensor


class Attempt(NamedTuple):
    """A reconstruction and what led to it, for the losses around it."""

    batch: Batch
    """`pixels` among its columns."""
    layers: LastLayers
    step: Scalar
    """Steps of the run before this one."""
    reconstruction: Reconstruction
    nll: Scalar


Extra = Callable[[Attempt], Losses]
"""A loss added to the bound, weighted already."""


@dataclass(frozen=True)
class GeneratorObjective:
    """nll + kl_weight KL + extras, nll of the error |x - x'| + perceptual_weight LPIPS(x, x').

    LPIPS is one number a picture, and counts at every pixel and channel of it, as in
    taming-transformers (arXiv 2012.09841).
    """

    perceptual: Perceptual | None
    """None leaves the distance out."""
    bound: Bound
    latent_channels: int
    downscale: int
    kl_weight: float
    perceptual_weight: float = 1.0
    extras: tuple[Extra, ...] = ()

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw the posterior's noise; the step is not random, but losses begin at one."""
        rows, height, width, _ = batch["image"].shape
        shape = (self.latent_channels, height // self.downscale, width // self.downscale)
        return {"noise": rng.local.normal(rows, *shape), "step": torch.tensor(float(rng.step))}

    def __call__(self, autoencoder: KLAutoencoder, batch: Batch, draws: Draws) -> Losses:
        """Compute the losses of `batch["pixels"]`; hands the reconstruction on."""
        pixels = batch["pixels"]
        made: Reconstruction = autoencoder(pixels, draws["noise"])
        model = autoencoder.model
        layers = LastLayers(model.encoder.conv_out.weight, model.decoder.conv_out.weight)
        error, terms = (pixels - made.pixels).abs(), {}
        if self.perceptual is not None:
            distance = self.perceptual(pixels, made.pixels)
            error = error + self.perceptual_weight * distance
            terms["lpips"] = distance.mean()
        nll, kl = self.bound(error, made.moments)
        nll = differentiate_once(nll, made.pixels)
        total = nll + self.kl_weight * kl
        terms |= {"nll": nll, "kl": kl, "error": error.mean()}
        attempt = Attempt(batch, layers, draws["step"], made, nll)
        for extra in self.extras:
            losses = extra(attempt)
            total, terms = total + losses.total, terms | losses.terms
        return Losses(total, terms, carry={RECONSTRUCTION: made.pixels.detach()})


@dataclass(frozen=True)
class SummedBound:
    """Sums over a picture and its latent, averaged over the batch (the published models')."""

    logvar: float = 0.0
    """Log variance of the pixels; the published code makes it a parameter that never learns."""

    def __call__(self, error: Pixels, moments: Moments) -> tuple[Scalar, Scalar]:
        """Compute sum(error / exp(logvar) + logvar) and the KL."""
        logvar = error.new_tensor(self.logvar)
        nll = error / logvar.exp() + logvar
        return nll.sum() / len(error), moments.elementwise_kl().sum() / len(error)


def averaged_bound(error: Pixels, moments: Moments) -> tuple[Scalar, Scalar]:
    """Average over pixels, and over the latent's elements (officially `pp_style`).

    The KL is without its factor 1/2 there.
    """
    return error.mean(), 2 * moments.elementwise_kl().mean()
