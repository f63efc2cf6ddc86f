"""Stage: pictures of any size -> squares of one size."""

from typing import Literal

from PIL import Image

from pipelines.rows import Reason, Refusal, Row

Fit = Literal["crop", "pad"]

_MAX_SCALED_PIXELS = 2**26


def crop(row: Row, *, size: int, fit: Fit) -> Row:
    """Make the picture a square of `size` pixels.

    Reads: picture (PIL, RGB).
    Writes: picture (PIL, RGB, size x size).
    Refuses: with `pad`, which never scales, pictures larger than the square; with `crop`, strips so
    thin that they would be enormous once scaled.
    """
    picture = row["picture"]
    square = center_crop(picture, size) if fit == "crop" else center_pad(picture, size)
    return {**row, "picture": square}


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` and cut out the middle.

    As in ADM (`center_crop_arr` of guided-diffusion, arXiv 2105.05233), whose ImageNet statistics
    are in use everywhere: halve with a box filter while that is possible, then bicubic.
    """
    picture = scale_shorter_side(picture, size)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return crop_at(picture, size, left=left, top=top)


def scale_shorter_side(picture: Image.Image, size: int) -> Image.Image:
    """Scale so that the shorter side has `size` pixels, in ADM's two steps."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    if width * height > _MAX_SCALED_PIXELS:
        raise Refusal(Reason.BOMB, f"{width} x {height} pixels once scaled")
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def crop_at(picture: Image.Image, size: int, *, left: int, top: int) -> Image.Image:
    """Cut a square out."""
    return picture.crop((left, top, left + size, top + size))


def center_pad(picture: Image.Image, size: int) -> Image.Image:
    """Put the picture in the middle of a black square."""
    if max(picture.size) > size:
        detail = f"{picture.width} x {picture.height} does not fit into {size} x {size}"
        raise Refusal(Reason.TOO_LARGE, detail)
    square = Image.new("RGB", (size, size))
    square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return square
