"""Pictures that are broken, enormous or meant to do harm, in a process of their own."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from jobs.fashion_mnist import bomb_png
from jobs.fetch_testdata import fetch_pillow_images

ROOT = Path(__file__).parents[2]
MAX_PIXELS = 9_000_000
MAX_BYTES = 12 * MAX_PIXELS
OVERHEAD_BYTES = 32 << 20  # of decoders, and of what is left of pictures before

# Carries every file of a folder through the stages; says how each ended, and the memory it took.
CARRY = """
import json, resource, sys, warnings
from functools import partial
from pathlib import Path
import PIL.AvifImagePlugin, PIL.WebPImagePlugin
from pipelines.rows import carry
from pipelines.stages.crop import crop
from pipelines.stages.decode import decode, identify
from pipelines.stages.write import encode_png

warnings.simplefilter("ignore")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
stages = (
    partial(identify, max_pixels=int(sys.argv[2])), decode, partial(crop, size=64, fit="crop"),
    encode_png,
)
before, ends = peak(), {}
for file in sorted(Path(sys.argv[1]).iterdir()):
    rows = carry([{"key": file.name, "source": file.name, "file": file.read_bytes()}], *stages)
    assert len(rows.kept) + len(rows.rejected) == 1
    ends[file.name] = rows.rejected[0].reason if rows.rejected else "kept"
print(json.dumps({"ends": ends, "bytes": peak() - before}))
"""


def _carry(folder):
    done = subprocess.run(
        [sys.executable, "-c", CARRY, str(folder), str(MAX_PIXELS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_file_of_pillows_own_tests_crashes_or_hangs_a_stage():
    folder = fetch_pillow_images()
    found = _carry(folder)
    assert len(found["ends"]) == len(list(folder.iterdir())) > 1000
    assert sum(end == "kept" for end in found["ends"].values()) > 600
    wanted = {
        "hopper.jpg": "kept",
        "hopper.webp": "kept",
        "avif-hopper.avif": "kept",
        "truncated_image.png": "decode/truncated",
        "decompression_bomb.gif": "decode/bomb",
        "png_decompression_dos.png": "decode/unsupported",
        "10ct_32bit_128.tiff": "decode/unsupported",
        "eps-zero_bb.eps": "decode/unidentified",
    }
    assert {name: found["ends"].get(name) for name in wanted} == wanted
    assert found["bytes"] < MAX_BYTES + OVERHEAD_BYTES


def _bytes(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _jpeg_bomb():
    """A small JPEG whose header says 60,000 x 60,000."""
    file = bytearray(_bytes(Image.new("RGB", (64, 64)), "JPEG"))
    start = file.index(b"\xff\xc0") + 5
    file[start : start + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(file)


def _text_bomb():
    """A PNG with a compressed text of 200 MB."""
    file = _bytes(Image.new("RGB", (64, 64)), "PNG")
    content = b"zTXtComment\0\0" + zlib.compress(bytes(200_000_000), 9)
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    return file[:33] + chunk + file[33:]


def _webp_bomb():
    """A small animation whose canvas is said to be 16,383 x 16,383."""
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    file = bytearray(_bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    start = file.index(b"VP8X") + 12
    file[start : start + 6] = (16_382).to_bytes(3, "little") * 2
    return bytes(file)


BOMBS = {
    "png": bomb_png(60_000),
    "gif": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(3) + b";",
    "jpg": _jpeg_bomb(),
    "text.png": _text_bomb(),
    "webp": _webp_bomb(),
    "tiff": _bytes(Image.new("1", (30_000, 30_000)), "TIFF", compression="group4"),
}


def test_a_bomb_does_not_raise_memory(tmp_path):
    for name, file in BOMBS.items():
        (tmp_path / f"bomb.{name}").write_bytes(file)
    found = _carry(tmp_path)
    assert all(end.startswith("decode/") for end in found["ends"].values()), found["ends"]
    assert found["bytes"] < OVERHEAD_BYTES


@pytest.fixture(scope="module")
def largest():
    """The largest pictures that are let through, in the modes that take most to convert."""
    side = int(MAX_PIXELS**0.5)
    image = Image.new("RGB", (side, side), (10, 200, 30))
    sideways = Image.Exif()
    sideways[0x0112] = 6
    return {
        "rgba.png": _bytes(image.convert("RGBA"), "PNG", compress_level=1),
        "palette.png": _bytes(image.convert("P"), "PNG", compress_level=1, transparency=0),
        "gray16.png": _bytes(Image.new("I;16", (side, side), 30_000), "PNG", compress_level=1),
        "sideways.jpg": _bytes(image, "JPEG", exif=sideways),
        "progressive.jpg": _bytes(image, "JPEG", progressive=True),
        "cmyk.jpg": _bytes(image.convert("CMYK"), "JPEG"),
    }


def test_the_largest_pictures_take_no_more_than_their_limit(largest, tmp_path):
    for name, file in largest.items():
        (tmp_path / name).write_bytes(file)
    found = _carry(tmp_path)
    assert set(found["ends"].values()) == {"kept"}
    assert found["bytes"] < MAX_BYTES + OVERHEAD_BYTES
