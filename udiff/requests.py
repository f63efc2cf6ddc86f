"""Pictures in requests: bytes of a picture file, which JSON holds as base64."""

import base64
import binascii
import io
from typing import Annotated, Any, get_args

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer

MAX_PICTURE_BYTES = 20 * 2**20
MAX_PICTURE_PIXELS = 2**25
"""Larger ones are refused before they are decoded."""


class _PictureMark:
    """Marks the fields that hold a picture."""


def _read_base64(value: Any) -> Any:
    """Read base64, with or without the `data:image/...;base64,` of a data URI."""
    if not isinstance(value, str):
        return value
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("must be the base64 of a picture file, or a data URI of one") from None


def _write_base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


Picture = Annotated[
    bytes,
    BeforeValidator(_read_base64),
    PlainSerializer(_write_base64, when_used="json"),
    Field(min_length=1, max_length=MAX_PICTURE_BYTES),
    _PictureMark(),
]
"""A picture file (PNG, JPEG, WebP ...) in a request."""


def picture_fields(request: type[BaseModel]) -> set[str]:
    """Name the fields of a request that hold a picture."""
    found = set()
    for name, field in request.model_fields.items():
        choices = (getattr(choice, "__metadata__", ()) for choice in get_args(field.annotation))
        marks = [*field.metadata, *(mark for choice in choices for mark in choice)]
        if any(isinstance(mark, _PictureMark) for mark in marks):
            found.add(name)
    return found


def record_fields(request: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Find the fields of a request that hold several records of a kind, which may hold pictures."""
    return {
        name: kind
        for name, field in request.model_fields.items()
        for kind in get_args(field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    }


def open_picture(data: bytes) -> Image.Image:
    """Decode a picture file to RGB.

    Raises:
        ValueError: it is none, is damaged, or has too many pixels.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PICTURE_PIXELS:
                raise ValueError(
                    f"the picture has {picture.width} x {picture.height} pixels, at most "
                    f"{MAX_PICTURE_PIXELS} are taken"
                )
            return picture.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("the picture is of no known format") from None
    except (OSError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture can't be decoded: {error}") from None
