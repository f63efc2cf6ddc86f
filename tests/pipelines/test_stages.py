import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs.fashion_mnist import bomb_png
from pipelines.rows import Reason, Refusal, carry, stable_text
from pipelines.stages.crop import center_crop, crop
from pipelines.stages.decode import decode, identify, to_rgb
from pipelines.stages.filter import check_caption, check_label, check_size
from pipelines.stages.read_shard import take_fields
from udiff.data.schema import NO_LABEL

MAX_PIXELS = 1_000_000


def _bytes(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _decode(file):
    return _decode_row({"key": "a", "source": "s", "file": file})


def _decode_row(row):
    return decode(identify(row, max_pixels=MAX_PIXELS))


# ---------------------------------------------------------------- read


def _fields(needs_caption=True, **members):
    row = take_fields({"key": "a", "source": "s", "members": members})
    return check_caption(row, required=needs_caption)


def test_caption_and_label_come_from_their_own_files_before_the_json():
    described = b'{"caption": "from json", "label": 3}'
    row = _fields(png=b"x", txt=b" from txt \n", cls=b"7", json=described)
    assert (row["caption"], row["label"], row["file"]) == ("from txt", "7", b"x")
    row = _fields(jpg=b"x", json=described)
    assert (row["caption"], row["label"]) == ("from json", 3)
    assert _fields(needs_caption=False, png=b"x")["caption"] == ""


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"a"}, Reason.MISSING_IMAGE),
        ({"png": b"", "txt": b"a"}, Reason.EMPTY),
        ({"png": b"x"}, Reason.MISSING_CAPTION),
        ({"png": b"x", "txt": b" \n"}, Reason.MISSING_CAPTION),
        ({"png": b"x", "txt": b"\xff\xfe"}, Reason.BAD_TEXT),
        ({"png": b"x", "json": b"{"}, Reason.BAD_TEXT),
        ({"png": b"x", "json": b"[1]"}, Reason.BAD_TEXT),
        ({"png": b"x", "json": b"[" * 100_000}, Reason.BAD_TEXT),
        ({"png": b"x", "json": b'{"caption": "\\ud800"}'}, Reason.BAD_TEXT),
        ({"png": b"x", "json": b'{"caption": 3}'}, Reason.BAD_TEXT),
    ],
)
def test_samples_that_lack_something_are_refused(members, reason):
    with pytest.raises(Refusal) as refusal:
        _fields(**members)
    assert refusal.value.reason == reason


# ---------------------------------------------------------------- decode


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (_bytes(_noise(64, 64))[:2000], Reason.TRUNCATED),
        (_bytes(_noise(64, 64), "JPEG")[:1500], Reason.TRUNCATED),
        (b"<html>404</html>", Reason.UNIDENTIFIED),
        (bomb_png(5000), Reason.BOMB),
        (bomb_png(100_000), Reason.BOMB),
        (_bytes(_noise(8, 8).convert("F"), "TIFF"), Reason.UNSUPPORTED),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", Reason.UNIDENTIFIED),
    ],
)
def test_broken_pictures_are_refused_with_their_reason(file, reason):
    with pytest.raises(Refusal) as refusal:
        _decode(file)
    assert refusal.value.reason == reason


@given(st.data())
def test_any_damage_ends_in_a_picture_or_a_refusal(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    file = bytearray(_bytes(_noise(16, 16), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    carried = carry([{"key": "a", "source": "s", "file": bytes(file)}], _decode_row)
    assert [row["picture"].mode for row in carried.kept] in (["RGB"], [])
    assert len(carried.kept) + len(carried.rejected) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_of_the_web_is_read(kind):
    row = _decode(_bytes(_noise(20, 10), kind))
    assert (row["width"], row["height"], row["picture"].mode) == (20, 10, "RGB")


def test_pictures_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    row = _decode(_bytes(_noise(20, 10), "JPEG", exif=exif))
    assert (row["width"], row["height"]) == (10, 20)


def test_transparency_becomes_white():
    hidden = Image.new("RGBA", (2, 2), (200, 10, 10, 0))
    palette = hidden.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    for image in (hidden, hidden.convert("LA"), palette):
        assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_the_background_of_transparent_pictures_has_a_name():
    hidden = {"opened": Image.new("RGBA", (2, 2), (200, 10, 10, 0)), "width": 2, "height": 2}
    assert decode(hidden, background="navy")["picture"].getpixel((0, 0)) == (0, 0, 128)


@pytest.mark.parametrize(("kind", "side"), [("JPEG", 200), ("PNG", 800)])
def test_only_jpegs_are_drafted_and_keep_their_size_on_record(kind, side):
    exif = Image.Exif()
    exif[0x0112] = 6
    row = {"key": "a", "source": "s", "file": _bytes(_noise(1000, 800), kind, exif=exif)}
    found = decode(identify(row, max_pixels=MAX_PIXELS), draft_side=200)
    assert (found["width"], found["height"]) == (800, 1000)
    assert found["picture"].width == side


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "AVIF"):
        file = _bytes(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, blue = _decode(file)["picture"].getpixel((4, 4))
        assert red > 240
        assert max(green, blue) < 15


def test_sixteen_bits_are_scaled_to_eight():
    values = np.array([[0, 257 * 128, 65535]], np.uint16)
    row = _decode(_bytes(Image.fromarray(values)))
    assert np.asarray(row["picture"])[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk_is_converted():
    row = _decode(_bytes(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = row["picture"].getpixel((0, 0))
    assert red > 200
    assert max(green, blue) < 60


# ---------------------------------------------------------------- filter


@pytest.mark.parametrize(("label", "number"), [(0, 0), ("9", 9), (" 3\n", 3)])
def test_labels_within_the_classes_pass(label, number):
    assert check_label({"label": label}, num_classes=10)["label"] == number


@pytest.mark.parametrize("label", [None, -1, 10, "ten", 1.5, True, [1], 2**70])
def test_labels_outside_the_classes_are_refused(label):
    with pytest.raises(Refusal) as refusal:
        check_label({"label": label}, num_classes=10)
    assert refusal.value.reason == Reason.BAD_LABEL


def test_without_classes_a_label_may_be_missing():
    assert check_label({"label": None}, num_classes=None)["label"] == NO_LABEL


def test_small_pictures_are_refused():
    assert check_size({"width": 64, "height": 80}, min_side=64)
    with pytest.raises(Refusal):
        check_size({"width": 64, "height": 63}, min_side=64)


# ---------------------------------------------------------------- crop


def _adm_center_crop(image, size):
    """`center_crop_arr` of openai/guided-diffusion, which the published statistics follow."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([8, 31, 32]))
def test_crop_is_that_of_adm(width, height, size):
    image = _noise(width, height)
    np.testing.assert_array_equal(np.array(center_crop(image, size)), _adm_center_crop(image, size))


def test_padding_keeps_every_pixel_and_refuses_what_is_larger():
    image = _noise(28, 27)
    square = np.array(crop({"picture": image}, size=32, fit="pad")["picture"])
    np.testing.assert_array_equal(square[2:29, 2:30], np.array(image))
    assert square.sum() == np.array(image).sum()
    with pytest.raises(Refusal) as refusal:
        crop({"picture": _noise(33, 8)}, size=32, fit="pad")
    assert refusal.value.reason == Reason.TOO_LARGE


def test_a_strip_that_would_be_enormous_once_scaled_is_refused():
    with pytest.raises(Refusal) as refusal:
        crop({"picture": Image.new("RGB", (50_000, 1))}, size=256, fit="crop")
    assert refusal.value.reason == Reason.BOMB


# ---------------------------------------------------------------- rows


def test_every_row_is_kept_or_rejected_in_order():
    def refuse_odd(row):
        if row["number"] % 2:
            raise Refusal(Reason.EMPTY, object())
        return row

    rows = [{"key": str(n), "source": f"s/{n}", "number": n} for n in range(5)]
    carried = carry(rows, refuse_odd)
    assert [row["number"] for row in carried.kept] == [0, 2, 4]
    assert [row.key for row in carried.rejected] == ["1", "3"]
    assert carried.rejected_counts() == {"read/empty": 2}
    assert carried.rejected[0].columns()["stage"] == "read"


def test_messages_lose_what_differs_between_runs():
    text = stable_text(f"cannot read {io.BytesIO()} of /tmp/x/y.png at 0x7f00deadbeef\nagain")
    assert text == "cannot read <object> of <path> at <address> again"


def test_reasons_are_a_stage_and_a_name():
    assert all(
        re.fullmatch(r"(download|read|decode|filter|dedup|recaption|encode)/[a-z_]+", each)
        for each in Reason
    )
