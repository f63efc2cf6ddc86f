"""LPIPS (arXiv 1801.03924): distance of pictures in features of VGG16, weighted by learned heads.

Attribute names are those of taming-transformers, whose checkpoints carry the network along.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from udiff.weights import load_strictly, read_checkpoint, strip_prefix

VGG_WIDTHS = (64, 128, 256, 512, 512)
SLICES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))
"""Layers of torchvision's VGG16 in each slice, which ends in relu1_2, 2_2, 3_3, 4_3, 5_3."""
PREFIXES = ("loss.perceptual_loss.", "training.perceptual.")
"""Where official training checkpoints, and bundles of one, keep it."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

Pixels = Float[Tensor, "batch 3 height width"]
Features = Float[Tensor, "batch channels h w"]


class LPIPS(nn.Module):
    """Distance of two batches of pictures in [-1, 1]; gradients flow, weights never learn.

    Always without dropout. The published training of VA-VAE switches the heads' dropout on by
    accident after its first step; evaluations have it off.
    """

    def __init__(self, widths: tuple[int, ...] = VGG_WIDTHS) -> None:
        super().__init__()
        self.scaling_layer = Scaling()
        self.net = VGGFeatures(widths)
        for number, width in enumerate(widths):
            setattr(self, f"lin{number}", Head(width))
        self.eval().requires_grad_(False)

    def forward(self, pixels: Pixels, other: Pixels) -> Float[Tensor, "batch 1 1 1"]:
        """Compute each pair's distance."""
        pairs = zip(
            self.net(self.scaling_layer(pixels)), self.net(self.scaling_layer(other)), strict=True
        )
        distance = pixels.new_zeros(len(pixels), 1, 1, 1)
        for number, (ours, theirs) in enumerate(pairs):
            difference = (_unit_length(ours) - _unit_length(theirs)).square()
            head: Head = getattr(self, f"lin{number}")
            distance = distance + head(difference).mean((2, 3), keepdim=True)
        return distance


class Scaling(nn.Module):
    """From [-1, 1] to the range that VGG16 was trained on."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    def forward(self, pixels: Pixels) -> Pixels:
        """Shift and scale each channel."""
        return (pixels - self.shift) / self.scale


class VGGFeatures(nn.Module):
    """The convolutions of VGG16 (arXiv 1409.1556), cut into five slices."""

    def __init__(self, widths: tuple[int, ...] = VGG_WIDTHS) -> None:
        super().__init__()
        layers = _vgg_layers(widths)
        for number, (start, end) in enumerate(SLICES, start=1):
            numbered = ((str(index), layers[index]) for index in range(start, end))
            stage = nn.Sequential()
            for name, layer in numbered:
                stage.add_module(name, layer)
            self.add_module(f"slice{number}", stage)

    def forward(self, x: Pixels, *, num_slices: int = len(SLICES)) -> list[Features]:
        """Compute what the first slices end in."""
        found = []
        for number in range(1, num_slices + 1):
            x = self.get_submodule(f"slice{number}")(x)
            found.append(x)
        return found


class Head(nn.Module):
    """Weights of a slice's channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The dropout that stood before the convolution keeps its place in the key.
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))

    def forward(self, difference: Features) -> Float[Tensor, "batch 1 h w"]:
        """Add the channels up."""
        return self.model(difference)


def load_lpips(path: str | Path | None = None) -> LPIPS:
    """Load LPIPS from a file of its weights, or put it together from torchvision and `lpips`.

    Args:
        path: safetensors or torch file with the keys of this module, bare or under one of
            `PREFIXES`; null takes VGG16 of torchvision (which downloads it once) and the heads in
            the package `lpips`.

    Raises:
        FileNotFoundError: there is no such file, or no package `lpips`.
        WeightsError: the file holds something else.
    """
    network = LPIPS()
    if path is None:
        weights = {**_torchvision_weights(), **_package_heads()}
    else:
        weights = read_checkpoint(path)
        found = (strip_prefix(weights, prefix) for prefix in PREFIXES)
        weights = next(filter(None, found), weights)
    constants = {k: t for k, t in network.state_dict().items() if k.startswith("scaling_layer.")}
    load_strictly(network, {**constants, **weights}, source=str(path or "torchvision and lpips"))
    return network


def rename_vgg(convolutions: dict[int, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Name weights and biases, given by their layer's number in torchvision, as `LPIPS` does."""
    named = {}
    for layer, tensors in convolutions.items():
        number = next(n for n, (start, end) in enumerate(SLICES, 1) if start <= layer < end)
        for name, tensor in zip(("weight", "bias"), tensors, strict=True):
            named[f"net.slice{number}.{layer}.{name}"] = tensor
    return named


def rename_heads(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the heads that the package `lpips` stores (`lin0.model.1.weight`) as `LPIPS` does."""
    return {key: tensor for key, tensor in weights.items() if key.startswith("lin")}


def _torchvision_weights() -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights, vgg16

    weights = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features.state_dict()
    layers = {int(key.partition(".")[0]) for key in weights}
    return rename_vgg({n: (weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in layers})


def _package_heads() -> dict[str, Tensor]:
    package = find_spec("lpips")
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "objective.perceptual_path is null, which needs the package `lpips` for the heads: pip "
            "install lpips, or name a file (python -m jobs.fetch_weights makes one)"
        )
    return rename_heads(read_checkpoint(Path(package.origin).parent / "weights/v0.1/vgg.pth"))


def _vgg_layers(widths: tuple[int, ...]) -> list[nn.Module]:
    """List the layers of torchvision's `vgg16().features`, without the last pooling."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in zip(widths, (2, 2, 3, 3, 3), strict=True):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return layers


def _unit_length(features: Features) -> Features:
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)
