"""The networks that the losses ask, by their settings."""

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from udiff.autoencoders.perceptual import LPIPS, load_lpips
from udiff.encoders.foundation import load_foundation
from udiff.encoders.frozen import Frozen
from udiff.models.vavae.alignment import Foundation
from udiff.models.vavae.settings import FoundationSettings
from udiff.system import Batch

CACHED_COLUMN = "dino_feature"
VGG_SLICES = 3


class VGGFoundation(nn.Module):
    """Features of LPIPS's VGG16 after relu3_3: 256 channels, one per 4 x 4 pixels."""

    def __init__(self, lpips: LPIPS) -> None:
        super().__init__()
        self.scaling_layer, self.net = lpips.scaling_layer, lpips.net

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Tensor:
        """Find the features."""
        return self.net(self.scaling_layer(pixels), num_slices=VGG_SLICES)[-1]


def make_foundation(settings: FoundationSettings, *, perceptual_path: str | None) -> Foundation:
    """Choose where features come from; a network is loaded at its first use."""
    match settings.model:
        case "cache":
            return cached_grid
        case "vgg":
            return partial(_ask, Frozen(lambda: VGGFoundation(load_lpips(perceptual_path))))
        case model:
            load = partial(load_foundation, model, settings.path, normalize=settings.normalize)
            return partial(_ask, Frozen(load))


def cached_grid(batch: Batch) -> Float[Tensor, "batch dim height width"]:
    """Take the features that were cached, tokens row by row of a grid of the picture's aspect."""
    tokens = batch[CACHED_COLUMN].float()
    height, width = batch["pixels"].shape[-2:]
    rows = round((tokens.shape[1] * height / width) ** 0.5)
    return tokens.mT.unflatten(2, (rows, -1))


def _ask(network: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    return network(batch["pixels"]).detach()
