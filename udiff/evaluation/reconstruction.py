"""How well pictures are reconstructed: PSNR and SSIM, as published autoencoders report them."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

WINDOW, SIGMA = 11, 1.5

Pixels = Float[Tensor, "batch 3 height width"]


def psnr(
    image: UInt8[Tensor, "batch height width 3"], other: UInt8[Tensor, "batch height width 3"]
) -> Float[Tensor, " batch"]:
    """Compute 20 log10(255 / root of the mean squared error) of each pair, in decibels.

    Infinite for equal pictures.
    """
    error = (image.double() - other.double()).square().mean((1, 2, 3))
    return 20 * torch.log10(255 / error.sqrt())


def ssim(pixels: Pixels, other: Pixels) -> Float[Tensor, " batch"]:
    """Compute the structural similarity of each pair (Wang et al., 2004), clipped to [-1, 1].

    A Gaussian window of 11 pixels in each channel, k1 = 0.01, k2 = 0.03; pictures are continued by
    reflection, and every pixel counts (as in torchmetrics).
    """
    x, y = pixels.clamp(-1, 1), other.clamp(-1, 1)
    c1, c2 = ((k * 2) ** 2 for k in (0.01, 0.03))
    mean_x, mean_y, x2, y2, xy = _blur(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    variance = (x2 - mean_x**2).clamp_min(0) + (y2 - mean_y**2).clamp_min(0)
    covariance = xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (variance + c2)).mean((1, 2, 3))


def evaluation_crop(
    image: UInt8[Tensor, "height width 3"], size: int
) -> Float[Tensor, "3 {size} {size}"]:
    """Scale the shorter side to `size`, smoothed and linear, and cut out the middle; to [-1, 1].

    The published evaluation's, other than the crop that latents are made with (ADM's).
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    sides = [int(size * side / shorter) for side in (height, width)]
    pixels = image.permute(2, 0, 1)[None].float() / 255
    scaled = interpolate(pixels, sides, mode="bilinear", align_corners=False, antialias=True)[0]
    top, left = (round((side - size) / 2) for side in sides)
    return scaled[:, top : top + size, left : left + size] * 2 - 1


def _blur(pixels: Tensor) -> Tensor:
    offsets = torch.arange(WINDOW, dtype=pixels.dtype, device=pixels.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA).square())
    window = torch.outer(weights, weights) / weights.sum() ** 2
    padded = pad(pixels, (WINDOW // 2,) * 4, mode="reflect")
    channels = pixels.shape[1]
    return conv2d(padded, window.expand(channels, 1, WINDOW, WINDOW), groups=channels)
