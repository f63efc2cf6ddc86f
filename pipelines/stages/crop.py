"""Stage: pictures of any size -> squares of one size, or rectangles of a few."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

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


class Bucket(NamedTuple):
    """A size that pictures are brought to."""

    height: int
    width: int

    @property
    def name(self) -> str:
        """Name it as files do."""
        return f"{self.height}x{self.width}"


def crop_to_bucket(row: Row, *, buckets: Sequence[Bucket]) -> Row:
    """Make the picture as large as a bucket: scale it to cover the bucket, cut out the middle.

    Reads: picture (PIL, RGB).
    Writes: picture (PIL, RGB, of the bucket's size); bucket (its name).
    Refuses: strips so thin that they would be enormous once scaled.
    """
    bucket = nearest_bucket(row["picture"].height, row["picture"].width, buckets)
    picture = scale_to_cover(row["picture"], *bucket)
    left, top = (picture.width - bucket.width) // 2, (picture.height - bucket.height) // 2
    cropped = picture.crop((left, top, left + bucket.width, top + bucket.height))
    return {**row, "picture": cropped, "bucket": bucket.name}


def nearest_bucket(height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """Choose the bucket whose aspect ratio is nearest.

    Of several with that aspect it is the largest that the picture fills without being enlarged, or
    else the smallest.
    """

    def badness(bucket: Bucket) -> tuple[float, bool, int]:
        aspect = abs(math.log(height * bucket.width / (width * bucket.height)))
        enlarges, area = bucket.height > height or bucket.width > width, math.prod(bucket)
        return round(aspect, 9), enlarges, area if enlarges else -area

    return min(buckets, key=badness)


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
    return scale_to_cover(picture, size, size)


def scale_to_cover(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Scale so that both sides just suffice, in ADM's two steps."""
    while picture.height >= 2 * height and picture.width >= 2 * width:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(height / picture.height, width / picture.width)
    scaled = round(picture.width * scale), round(picture.height * scale)
    if math.prod(scaled) > _MAX_SCALED_PIXELS:
        raise Refusal(Reason.BOMB, f"{scaled[0]} x {scaled[1]} pixels once scaled")
    return picture.resize(scaled, Image.Resampling.BICUBIC)


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
