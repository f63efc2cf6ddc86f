"""Alignment of latents with a vision foundation model (VF loss, arXiv 2501.01423, section 3)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, normalize, relu

from udiff.models.vavae.objective import Attempt
from udiff.models.vavae.weight import LossWeight
from udiff.system import Batch, Losses

Grid = Float[Tensor, "batch dim height width"]
Foundation = Callable[[Batch], Tensor]
"""Finds a grid of features, batch x dim x height x width, for a batch."""
Pairing = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Brings latent and feature to one width by a projection."""


def project_latent(projection: nn.Module, latent: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    """Bring the latent to the feature's width (officially `reverse_proj`)."""
    return projection(latent), feature


def project_feature(
    projection: nn.Module, latent: Tensor, feature: Tensor
) -> tuple[Tensor, Tensor]:
    """Bring the feature to the latent's width."""
    return latent, projection(feature)


def distance_matrix_loss(latent: Grid, feature: Grid, *, margin: float) -> Float[Tensor, ""]:
    """Average how far cosines between places differ, beyond the margin (equation 6)."""
    difference = _similarities(latent) - _similarities(feature)
    return relu(difference.abs() - margin).mean()


def marginal_cosine_loss(latent: Grid, feature: Grid, *, margin: float) -> Float[Tensor, ""]:
    """Average 1 - margin - cosine of latent and feature, where positive (equation 5)."""
    return relu(1 - margin - cosine_similarity(feature, latent, dim=1)).mean()


@dataclass(frozen=True)
class FoundationAlignment:
    """Latents whose places resemble the foundation model's, and each other as there.

    Both terms see the projected tensors, as in the published code.
    """

    foundation: Foundation
    projection: nn.Module
    pairing: Pairing
    weight: LossWeight
    distance_margin: float = 0.0
    cosine_margin: float = 0.0
    distance_weight: float = 1.0
    cosine_weight: float = 1.0

    def __call__(self, attempt: Attempt) -> Losses:
        """Compute the loss, balanced at the encoder's last layer."""
        loss = self.compare(attempt.reconstruction.raw, self.foundation(attempt.batch))
        weight = self.weight(attempt.nll, loss, attempt.layers.encoder)
        return Losses(weight * loss, {"alignment": loss, "alignment_weight": weight})

    def compare(
        self,
        latent: Float[Tensor, "batch channels height width"],
        feature: Float[Tensor, "batch dim h w"],
    ) -> Float[Tensor, ""]:
        """Compute both terms; features of another grid than the latent's are interpolated to it."""
        if feature.shape[-2:] != latent.shape[-2:]:
            feature = interpolate(feature, latent.shape[-2:], mode="bilinear", align_corners=False)
        ours, theirs = self.pairing(self.projection, latent, feature)
        distance = distance_matrix_loss(ours, theirs, margin=self.distance_margin)
        cosine = marginal_cosine_loss(ours, theirs, margin=self.cosine_margin)
        return self.distance_weight * distance + self.cosine_weight * cosine


def _similarities(grid: Grid) -> Float[Tensor, "batch places places"]:
    places = normalize(grid.flatten(2), dim=1)
    return torch.einsum("bci,bcj->bij", places, places)
