"""Stages: the bytes of a picture file -> an upright RGB picture.

A picture is identified by its header first, so that what is too small, too large or a bomb is
refused before any pixel is decoded. Decoding takes at most about 12 bytes per pixel, and
`max_pixels` bounds the pixels.
"""

import io

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

from pipelines.rows import Reason, Refusal, Row

# Named, since Pillow would otherwise also open formats that start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_MAX_UINT16 = 65535
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def identify(row: Row, *, max_pixels: int) -> Row:
    """Read a picture's header; of an animation, that of its first frame.

    Reads: file (bytes).
    Writes: opened (PIL, not decoded yet), width and height (as they are stored); drops file.
    Refuses: what is no picture, and more than `max_pixels`.
    """
    try:
        opened = Image.open(io.BytesIO(row["file"]), formats=_FORMATS)
    except Exception as error:  # broken files raise everything from SyntaxError to MemoryError
        raise Refusal(_reason(error), error) from error
    if opened.width * opened.height > max_pixels:
        raise Refusal(Reason.BOMB, f"{opened.width} x {opened.height} pixels")
    rest = {name: value for name, value in row.items() if name != "file"}
    return {**rest, "opened": opened, "width": opened.width, "height": opened.height}


def decode(row: Row, *, background: str = "white", draft_side: int | None = None) -> Row:
    """Decode a picture: upright, 8 bits per channel, on `background` where it is transparent.

    With `draft_side`, JPEGs are decoded at a half, a quarter or an eighth as long as both sides
    keep that many pixels: several times as fast, and not the same pixels.

    Reads: opened (PIL), width, height.
    Writes: picture (PIL, RGB), width and height (of the upright original); drops opened.
    Refuses: what Pillow cannot read whole.
    """
    opened, size = row["opened"], (row["width"], row["height"])
    try:
        if draft_side is not None:
            opened.draft(opened.mode, (draft_side, draft_side))
        opened.load()
        if _orientation(opened) in _SIDEWAYS:
            size = size[::-1]
        picture = to_rgb(_upright(opened), background=background)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(_reason(error), error) from error
    rest = {name: value for name, value in row.items() if name != "opened"}
    return {**rest, "picture": picture, "width": size[0], "height": size[1]}


def to_rgb(image: Image.Image, *, background: str = "white") -> Image.Image:
    """Convert any mode to RGB: on `background` where transparent, 16 bits scaled to 8."""
    if image.mode == "F":
        raise Refusal(Reason.UNSUPPORTED, "floating point pixels")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, ImageColor.getrgb(background)[:3])
        canvas.paste(image, mask=image)
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > _MAX_UINT16:
        raise Refusal(Reason.UNSUPPORTED, "32 bits per pixel")
    # round(v / 257): no tie, since 257 is odd
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF, in a picture that is fine: it stays as it is stored
        return None


def _upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # as above
        return image
    return image


def _reason(error: Exception) -> Reason:
    if isinstance(error, UnidentifiedImageError):
        return Reason.UNIDENTIFIED
    if isinstance(error, Image.DecompressionBombError):
        return Reason.BOMB
    if "truncated" in str(error).lower():
        return Reason.TRUNCATED
    return Reason.CORRUPT if isinstance(error, OSError | SyntaxError) else Reason.UNSUPPORTED
