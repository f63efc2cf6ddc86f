"""Pictures of any size -> squares of one size, by rules of published codes that differ slightly.

All take a PIL picture in RGB and give uint8 (size, size, 3), but for `bilinear_from_float`, which
never rounds and gives pixels in [-1, 1], float32 (3, size, size).
"""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

Picture = UInt8[np.ndarray, "size size 3"]
MAX_RATIO = 16
"""Of the sides, up to which a whole picture is resized, however little of it is kept."""


def bicubic(picture: Image.Image, size: int) -> Picture:
    """Resize the shorter side (bicubic), then cut the middle out, as torchvision does.

    Of a strip longer than `MAX_RATIO` the ends are cut off before: one of 1 x 4000 pixels would
    take gigabytes.
    """
    picture = _shorten(picture)
    width, height = picture.size
    if width <= height:
        scaled = size, int(size * height / width)
    else:
        scaled = int(size * width / height), size
    resized = picture.resize(scaled, Image.Resampling.BICUBIC)
    return np.asarray(_cut(resized, size, left=_half(scaled[0], size), top=_half(scaled[1], size)))


def lanczos(picture: Image.Image, size: int) -> Picture:
    """Cut the middle out, offsets rounded down, then resize (Lanczos)."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = _cut(picture, side, left=left, top=top)
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def bilinear(picture: Image.Image, size: int) -> Picture:
    """Cut the middle out, then resize (antialiased bilinear, on whole levels)."""
    resized = _interpolate(_middle(picture), size)
    return np.ascontiguousarray(resized.transpose(1, 2, 0))


def bilinear_from_float(picture: Image.Image, size: int) -> Float32[np.ndarray, "3 size size"]:
    """Do as `bilinear`, but on numbers: to pixels in [-1, 1] without rounding."""
    levels = _middle(picture).astype(np.float32) / 255
    return (_interpolate(levels, size) - 0.5) / 0.5


def _shorten(picture: Image.Image) -> Image.Image:
    longest = MAX_RATIO * min(picture.size)
    if max(picture.size) <= longest:
        return picture
    width, height = (min(side, longest) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _middle(picture: Image.Image) -> np.ndarray:
    side = min(picture.size)
    left, top = _half(picture.width, side), _half(picture.height, side)
    return np.asarray(_cut(picture, side, left=left, top=top))


def _interpolate(square: np.ndarray, size: int) -> np.ndarray:
    """Resize (height, width, channels) to (channels, size, size) in the array's dtype."""
    import torch
    from torch.nn.functional import interpolate

    # Channels stay last in memory: torch then takes the kernel that the published values are of.
    tensor = torch.from_numpy(square.copy()).permute(2, 0, 1)[None]
    if tensor.shape[-1] == size:
        return tensor[0].numpy()
    return interpolate(tensor, size=(size, size), mode="bilinear", antialias=True)[0].numpy()


def _cut(picture: Image.Image, side: int, *, left: int, top: int) -> Image.Image:
    return picture.crop((left, top, left + side, top + side))


def _half(length: int, side: int) -> int:
    # Half to even, as torchvision rounds.
    return round((length - side) / 2)
