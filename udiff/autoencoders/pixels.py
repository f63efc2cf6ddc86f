"""Pictures as bytes and as numbers: `image` is uint8 HWC, `pixels` float CHW in [-1, 1]."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def to_pixels(
    image: UInt8[Tensor, "batch height width channels"],
) -> Float[Tensor, "batch channels height width"]:
    """Map 0..255 to [-1, 1]."""
    return image.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(
    pixels: Float[Tensor, "batch channels height width"],
) -> UInt8[Tensor, "batch height width channels"]:
    """Map [-1, 1] to 0..255, to the nearest level; values outside are clipped."""
    levels = (pixels.float() * 127.5 + 128).clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_uint8_truncating(
    pixels: Float[Tensor, "batch channels height width"],
) -> UInt8[Tensor, "batch height width channels"]:
    """Map [-1, 1] to 0..255, to the level below; ADM, DiT and MDT write their samples so."""
    levels = ((pixels.float() + 1) * 127.5).clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
