"""Pictures in requests."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel, ValidationError

from udiff.requests import (
    MAX_PICTURE_PIXELS,
    Picture,
    open_picture,
    picture_fields,
    record_fields,
)


class Request(BaseModel):
    image: Picture
    prompt: str = ""


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@given(st.binary(min_size=1))
def test_bytes_survive_json(data):
    sent = Request(image=data).model_dump_json()
    assert Request.model_validate_json(sent).image == data


def test_a_data_uri_is_read_too():
    text = "data:image/png;base64," + base64.b64encode(b"file").decode()
    assert Request(image=text).image == b"file"


def test_what_is_no_base64_is_refused():
    with pytest.raises(ValidationError, match="must be the base64 of a picture file"):
        Request(image="not base64!")


def test_fields_that_hold_a_picture_are_known():
    assert picture_fields(Request) == {"image"}


def test_pictures_become_rgb():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(open_picture(png(Image.fromarray(pixels))), pixels)
    assert open_picture(png(Image.new("P", (3, 2)))).mode == "RGB"


@pytest.mark.parametrize("data", [b"<html>", png(Image.new("RGB", (64, 64), "red"))[:-40], b""])
def test_a_damaged_file_is_a_value_error(data):
    with pytest.raises(ValueError, match="the picture"):
        open_picture(data)


def test_too_many_pixels_are_refused_before_they_are_decoded():
    data = png(Image.new("1", (8192, MAX_PICTURE_PIXELS // 8192 + 1)))
    with pytest.raises(ValueError, match="at most"):
        open_picture(data)


def test_pictures_may_be_optional_and_lie_in_records():
    class Part(BaseModel):
        image: Picture
        mask: Picture | None = None

    class Request(BaseModel):
        parts: tuple[Part, ...]
        prompt: str = ""

    assert picture_fields(Part) == {"image", "mask"}
    assert picture_fields(Request) == set()
    assert record_fields(Request) == {"parts": Part}
