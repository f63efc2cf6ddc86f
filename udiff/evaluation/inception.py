"""The Inception network of 2015 (arXiv 1512.00567) that published FID, IS and sFID are made with.

Attribute names are those of the PyTorch ports' weights file (`weights-inception-2015-12-05`, as of
torch-fidelity and pytorch-fid). Unlike torchvision's network, it resizes pictures as TensorFlow 1
did, leaves the padding out of averages, has a max pool in its last block, and 1,008 classes.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from udiff.weights import load_strictly, read_checkpoint

INPUT_SIZE = 299
NUM_SPATIAL_CHANNELS = 7

Activations = Float[Tensor, "batch channels height width"]


class InceptionFeatures(NamedTuple):
    """What the metrics need of a picture."""

    pool: Float[Tensor, "batch features"]
    """2,048 averages over the picture, for FID, IS, precision and recall."""
    spatial: Float[Tensor, "batch spatial_features"]
    """17 x 17 places of 7 channels in the middle of the network, channel fastest, for sFID."""


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Activations) -> Activations:
        """Convolve."""
        return relu(self.bn(self.conv(x)))


class MixedA(nn.Module):
    """Mixed_5b to 5d."""

    def __init__(self, in_channels: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(in_channels, 64, 1)
        self.branch5x5_1 = Convolution(in_channels, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(in_channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(in_channels, pool_features, 1)

    def forward(self, x: Activations) -> Activations:
        """Join the branches."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pooled = self.branch_pool(average_pool(x))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, pooled], dim=1
        )


class MixedB(nn.Module):
    """Mixed_6a; halves the sides."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(in_channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Activations) -> Activations:
        """Join the branches."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halving_max_pool(x)], dim=1)


class MixedC(nn.Module):
    """Mixed_6b to 6e; convolutions of 7 are split into a row and a column."""

    def __init__(self, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Convolution(768, 192, 1)
        self.branch7x7_1 = Convolution(768, width, 1)
        self.branch7x7_2 = Convolution(width, width, row, padding=(0, 3))
        self.branch7x7_3 = Convolution(width, 192, column, padding=(3, 0))
        self.branch7x7dbl_1 = Convolution(768, width, 1)
        self.branch7x7dbl_2 = Convolution(width, width, column, padding=(3, 0))
        self.branch7x7dbl_3 = Convolution(width, width, row, padding=(0, 3))
        self.branch7x7dbl_4 = Convolution(width, width, column, padding=(3, 0))
        self.branch7x7dbl_5 = Convolution(width, 192, row, padding=(0, 3))
        self.branch_pool = Convolution(768, 192, 1)

    def forward(self, x: Activations) -> Activations:
        """Join the branches; the first 192 channels are those of the 1 x 1 branch."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat(
            [self.branch1x1(x), single, double, self.branch_pool(average_pool(x))], dim=1
        )


class MixedD(nn.Module):
    """Mixed_7a; halves the sides."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(768, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(768, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Activations) -> Activations:
        """Join the branches."""
        single = self.branch3x3_2(self.branch3x3_1(x))
        double = self.branch7x7x3_2(self.branch7x7x3_1(x))
        double = self.branch7x7x3_4(self.branch7x7x3_3(double))
        return torch.cat([single, double, halving_max_pool(x)], dim=1)


class MixedE(nn.Module):
    """Mixed_7b, which pools averages, and 7c, which pools maxima."""

    def __init__(self, in_channels: int, *, takes_maxima: bool) -> None:
        super().__init__()
        self._pool = max_pool if takes_maxima else average_pool
        self.branch1x1 = Convolution(in_channels, 320, 1)
        self.branch3x3_1 = Convolution(in_channels, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Convolution(in_channels, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Convolution(in_channels, 192, 1)

    def forward(self, x: Activations) -> Activations:
        """Join the branches."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self._pool(x)),
        ]
        return torch.cat(branches, dim=1)


class Inception(nn.Module):
    """Pictures of any size -> features; in evaluation mode, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = MixedA(192, 32)
        self.Mixed_5c = MixedA(256, 64)
        self.Mixed_5d = MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(128)
        self.Mixed_6c = MixedC(160)
        self.Mixed_6d = MixedC(160)
        self.Mixed_6e = MixedC(192)
        self.Mixed_7a = MixedD()
        self.Mixed_7b = MixedE(1280, takes_maxima=False)
        self.Mixed_7c = MixedE(2048, takes_maxima=True)
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, image: UInt8[Tensor, "batch height width 3"]) -> InceptionFeatures:
        """Resize, normalize, and run the network."""
        pixels = image.to(self.fc.weight.device).permute(0, 3, 1, 2).float()
        x = normalize(resize_bilinear(pixels, (INPUT_SIZE, INPUT_SIZE)))
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_max_pool(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halving_max_pool(x))))
        middle = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(middle))))
        spatial = middle[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return InceptionFeatures(x.mean(dim=(2, 3)), spatial)

    @property
    def class_weight(self) -> Float[Tensor, "features classes"]:
        """Of the last layer; the Inception score has no bias."""
        return self.fc.weight.T


def load_inception(path: str | Path) -> Inception:
    """Load the network from a local weights file.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it holds something else.
    """
    network = Inception()
    load_strictly(network, read_checkpoint(path), source=str(path))
    return network


def resize_bilinear(pixels: Activations, size: tuple[int, int]) -> Activations:
    """Resize as TensorFlow 1: pixel i comes from i * in / out, corner to corner, not smoothed."""
    for axis, length in zip((-2, -1), size, strict=True):
        source = torch.arange(length, device=pixels.device) * (pixels.shape[axis] / length)
        low = source.long()
        high = (low + 1).clamp_max(pixels.shape[axis] - 1)
        weight = (source - low).view(-1, *[1] * (-1 - axis))
        start = pixels.index_select(axis, low)
        pixels = start + (pixels.index_select(axis, high) - start) * weight
    return pixels


def normalize(pixels: Activations) -> Activations:
    """Map 0..255 to about [-1, 1]."""
    return (pixels - 128) / 128


def average_pool(x: Activations) -> Activations:
    """Average 3 x 3 neighbors; those outside the picture do not count."""
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Activations) -> Activations:
    """Take the largest of 3 x 3 neighbors."""
    return max_pool2d(x, 3, stride=1, padding=1)


def halving_max_pool(x: Activations) -> Activations:
    """Take the largest of 3 x 3 neighbors of every second pixel, inside the picture."""
    return max_pool2d(x, 3, stride=2)
