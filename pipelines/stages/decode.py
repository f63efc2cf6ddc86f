"""Stage: the bytes of a picture file -> an upright RGB picture."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.rows import Reason, Refusal, Row

# Named, since Pillow would otherwise also open formats that start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_MAX_UINT16 = 65535


def decode(row: Row, *, max_pixels: int) -> Row:
    """Decode a picture; turned upright, on white where it is transparent, 8 bits per channel.

    Reads: file (bytes).
    Writes: picture (PIL, RGB), width and height (of the upright original); drops file.
    Refuses: what Pillow cannot read whole, and more than `max_pixels`, before decoding them.
    """
    try:
        picture = _open(row["file"], max_pixels)
    except Refusal:
        raise
    except Exception as error:  # broken files raise everything from SyntaxError to MemoryError
        raise Refusal(_reason(error), error) from error
    rest = {name: value for name, value in row.items() if name != "file"}
    return {**rest, "picture": picture, "width": picture.width, "height": picture.height}


def _open(file: bytes, max_pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(file), formats=_FORMATS) as image:
        if image.width * image.height > max_pixels:
            raise Refusal(Reason.BOMB, f"{image.width} x {image.height} pixels")
        image.load()
        return to_rgb(_upright(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: on white where transparent, 16 bits scaled to 8."""
    if image.mode == "F":
        raise Refusal(Reason.UNSUPPORTED, "floating point pixels")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > _MAX_UINT16:
        raise Refusal(Reason.UNSUPPORTED, "32 bits per pixel")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF, in a picture that is fine: it stays as it is stored
        return image.copy()


def _reason(error: Exception) -> Reason:
    if isinstance(error, UnidentifiedImageError):
        return Reason.UNIDENTIFIED
    if isinstance(error, Image.DecompressionBombError):
        return Reason.BOMB
    if "truncated" in str(error).lower():
        return Reason.TRUNCATED
    return Reason.CORRUPT if isinstance(error, OSError | SyntaxError) else Reason.UNSUPPORTED
