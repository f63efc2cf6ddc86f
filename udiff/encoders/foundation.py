"""Vision foundation models as VA-VAE (arXiv 2501.01423) aligns latents to them: grids of features.

Both are vision transformers of timm. The released autoencoders were trained with pictures in
[-1, 1] as they are; normalizing them as the models expect (`normalize`) is what was meant.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from udiff.weights import load_strictly, read_checkpoint, strip_prefix

if TYPE_CHECKING:
    from timm.models import VisionTransformer

FoundationName = Literal["dinov2", "mae"]
TIMM_NAMES: dict[FoundationName, str] = {
    "dinov2": "vit_large_patch14_dinov2.lvd142m",
    "mae": "vit_large_patch16_224.mae",
}
PREFIXES = ("foundation_model.model.", "training.foundation.")
"""Where official training checkpoints, and bundles of one, keep it."""
STRIDE = 16
"""Pixels along one side of a feature, of both models."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FoundationModel(nn.Module):
    """Pixels in [-1, 1] -> features after the final norm, one per 16 x 16 pixels."""

    def __init__(self, model: "VisionTransformer", *, normalize: bool = False) -> None:
        """Wrap a transformer of timm that was made with `dynamic_img_size=True`."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.normalize = normalize

    @torch.no_grad()
    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim h w"]:
        """Find the features; timm resamples the position table (bicubic, antialiased).

        For patches of 14 pixels the picture is first made 14/16 of its size, bilinearly and not
        antialiased. The published code makes it 224 pixels whatever it is, which is the same for
        the 256 pixels that it works with.
        """
        grid = [side // STRIDE for side in pixels.shape[-2:]]
        size = [side * self.model.patch_embed.patch_size[0] for side in grid]
        if self.normalize:
            pixels = _normalize(pixels)
        if size != list(pixels.shape[-2:]):
            pixels = interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        tokens = self.model.forward_features(pixels)[:, self.model.num_prefix_tokens :]
        return tokens.mT.unflatten(2, grid)


def load_foundation(
    name: FoundationName, path: str | None = None, *, normalize: bool = False
) -> FoundationModel:
    """Load a model from the hub, or its weights from a file.

    Args:
        name: which of the two.
        path: timm name of another size, or a safetensors or torch file with the weights of the
            published size, bare or under one of `PREFIXES`.
        normalize: shift and scale pixels as the model was trained with.

    Raises:
        FileNotFoundError: the model can't be reached.
        WeightsError: the file holds something else.
    """
    timm_name = TIMM_NAMES[name]
    if path is not None and Path(path).is_file():
        model = make_foundation(timm_name)
        weights = read_checkpoint(path)
        found = (strip_prefix(weights, prefix) for prefix in PREFIXES)
        weights = next(filter(None, found), weights)
        load_strictly(model, weights, source=path)
        return FoundationModel(model, normalize=normalize)
    try:
        model = make_foundation(path or timm_name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"the foundation model {path or timm_name!r} is neither a file nor a model of timm "
            "that can be reached"
        ) from error
    return FoundationModel(model, normalize=normalize)


def make_foundation(timm_name: str, *, pretrained: bool = False) -> "VisionTransformer":
    """Make a vision transformer that takes pictures of any size."""
    from timm import create_model
    from timm.models import VisionTransformer

    model = create_model(timm_name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"timm's {timm_name} is no vision transformer")
    return model


def _normalize(pixels: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(values, device=pixels.device).view(3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return ((pixels + 1) / 2 - mean) / std
