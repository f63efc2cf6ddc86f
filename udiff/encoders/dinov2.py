"""DINOv2 (arXiv 2304.07193) as REPA uses it: patch tokens of a frozen transformer, by timm."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from udiff.weights import hash_module

if TYPE_CHECKING:
    from timm.models import VisionTransformer

DEFAULT_MODEL = "vit_base_patch14_dinov2.lvd142m"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2(nn.Module):
    """Encode pictures to their patch tokens, after the final norm and without the class token."""

    def __init__(self, model: "VisionTransformer") -> None:
        """Wrap a vision transformer of timm that was made with `dynamic_img_size=True`."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Encode pictures in [0, 1]; timm resamples the position table (bicubic, antialiased)."""
        tokens = self.model.forward_features(prepare_image(image))
        return tokens[:, self.model.num_prefix_tokens :]

    def fingerprint(self) -> str:
        """Hash what the tokens depend on: architecture and weights."""
        return hash_module(self.model, {"architecture": str(self.model)})


def prepare_image(
    image: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 resized_height resized_width"]:
    """Normalize a picture in [0, 1], then resize it (bicubic, not antialiased), in this order."""
    mean, std = (
        torch.tensor(values, device=image.device).view(3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    size = [int(224 * side / 256) for side in image.shape[-2:]]
    return interpolate((image - mean) / std, size=size, mode="bicubic", align_corners=False)


def load_dinov2(name: str = DEFAULT_MODEL) -> DINOv2:
    """Load an encoder by its timm name (from the hub), or `DEFAULT_MODEL` from a safetensors file.

    Raises:
        FileNotFoundError: there is no such file, and no such model that can be reached.
    """
    if Path(name).suffix == ".safetensors":
        model = _create(DEFAULT_MODEL, pretrained=False)
        try:
            model.load_state_dict(load_file(name), strict=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise FileNotFoundError(
                f"objective.alignment.teacher {name} holds no weights of {DEFAULT_MODEL}: {error}"
            ) from None
        return DINOv2(model)
    try:
        return DINOv2(_create(name, pretrained=True))
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"objective.alignment.teacher {name!r} is neither a .safetensors file nor a model of "
            "timm that can be reached"
        ) from error


def _create(name: str, *, pretrained: bool) -> "VisionTransformer":
    from timm import create_model
    from timm.models import VisionTransformer

    model = create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    if not isinstance(model, VisionTransformer):
        raise RuntimeError(f"{name} is not a vision transformer")
    return model
