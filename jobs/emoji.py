"""Fetch small colored pictures with captions, and write them as web shards.

    python -m jobs.emoji --out runs/versatile/shards

They are Noto's emoji (Apache-2.0) with their names: about 1,500 things, animals, food, places and
faces, 64 pixels wide, on white.
"""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from jobs.console import make_parser, run_job
from jobs.fashion_mnist import Members, fetch, write_shards

PACKAGE = "emoji-datasource-google@16.0.0"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
CATEGORIES = (
    "Objects", "Travel & Places", "Smileys & Emotion", "Animals & Nature", "Food & Drink",
    "Activities", "People & Body",
)  # fmt: skip


def write_emoji(out: Path, *, shard_rows: int = 400, cache: Path = Path(".cache")) -> int:
    """Write the shards; equal arguments give equal bytes.

    Args:
        out: folder that must not exist yet.
        shard_rows: samples of a shard.
        cache: where the download (74 MB) is kept.

    Returns:
        The number of samples.

    Raises:
        FileExistsError: there are shards already.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it or choose another --out")
    samples = list(read_samples(fetch(cache, package=PACKAGE, sha256=SHA256)))
    write_shards(out, samples, shard_rows)
    return len(samples)


def read_samples(archive: Path) -> Iterator[Members]:
    """Read the pictures of the package that are no flags, letters or signs, with their names."""
    with tarfile.open(archive) as package:
        listed = package.extractfile("package/emoji.json")
        assert listed is not None
        entries = {f"package/img/google/64/{each['image']}": each for each in json.load(listed)}
    with tarfile.open(archive) as package:  # once more from its begin: it is read in order
        for member in package:
            entry = entries.get(member.name)
            file = package.extractfile(member)
            if entry is not None and entry["category"] in CATEGORIES and file is not None:
                yield _sample(file.read(), entry)


def _sample(png: bytes, entry: dict[str, str]) -> Members:
    name = entry["name"] or entry["short_name"].replace("-", " ").replace("_", " ")
    caption = name.lower()
    with Image.open(io.BytesIO(png)) as picture:
        drawn = picture.convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    white.alpha_composite(drawn)
    file = io.BytesIO()
    white.convert("RGB").save(file, "PNG")
    described = {
        "caption": caption,
        "width": drawn.width,
        "height": drawn.height,
        "original_width": drawn.width,
        "original_height": drawn.height,
    }
    return {
        "png": file.getvalue(),
        "txt": caption.encode(),
        "json": json.dumps(described).encode(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the shards."""
    parser = make_parser("jobs.emoji", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="of the download")
    options = parser.parse_args(arguments)

    def job() -> None:
        print(f"wrote {write_emoji(options.out, cache=options.cache)} samples to {options.out}")

    return run_job(job)


if __name__ == "__main__":
    sys.exit(main())
