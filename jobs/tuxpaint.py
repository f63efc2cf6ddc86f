"""Write web shards of captioned pictures: the stamps of Tux Paint, with conversations about them.

    python -m jobs.tuxpaint --out runs/tux/shards

785 photographs and cartoons with captions that people wrote (GPL-2, Debian's package
`tuxpaint-stamps-default`, 161 MB), without letters and coins. Each sample's JSON also holds a
conversation as LLaVA has them: what is shown, and what kind of thing it is. The package is
downloaded by apt and unpacked by dpkg; nothing is installed, and nothing of it is run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jobs.console import make_parser, run_job
from jobs.fashion_mnist import Members, write_shards

PACKAGE = "tuxpaint-stamps-default"
STAMPS = "usr/share/tuxpaint/stamps"
LEFT_OUT = "symbols"
KINDS = {
    "animals": "an animal", "clothes": "clothing", "food": "food", "hobbies": "a hobby",
    "household": "a thing of the house", "medical": "medicine", "military": "the military",
    "naturalforces": "a force of nature", "people": "a person", "plants": "a plant",
    "seasonal": "a season", "space": "space", "sports": "a sport", "town": "a thing of the town",
    "vehicles": "a vehicle",
}  # fmt: skip
WHAT, KIND = "What is this?", "What kind of thing is it?"


def write_tuxpaint(out: Path, *, shard_rows: int = 200, cache: Path = Path(".cache")) -> int:
    """Write the shards; returns how many samples there are. Equal packages give equal bytes.

    Raises:
        FileExistsError: there are shards already.
        RuntimeError: the package can't be fetched or unpacked.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it or choose another --out")
    samples = list(read_samples(fetch(cache)))
    write_shards(out, samples, shard_rows)
    return len(samples)


def fetch(cache: Path) -> Path:
    """Fetch and unpack the package, unless it is there; returns the folder of the stamps.

    Raises:
        RuntimeError: apt or dpkg failed.
    """
    target = cache / PACKAGE
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            _run(["apt-get", "download", PACKAGE], Path(name))
            archive = next(Path(name).glob("*.deb"))
            _run(["dpkg", "-x", archive.name, "unpacked"], Path(name))
            (Path(name) / "unpacked").rename(target)
    return target / STAMPS


def read_samples(stamps: Path) -> Iterator[Members]:
    """Read the pictures that have a caption, in the order of their paths."""
    for picture in sorted(stamps.rglob("*.png")):
        kind = picture.relative_to(stamps).parts[0]
        text = picture.with_suffix(".txt")
        if kind == LEFT_OUT or not text.exists():
            continue
        caption = text.read_text("utf-8").splitlines()[0].strip()
        if caption:
            described = {"caption": caption, "conversations": _talk(caption, KINDS[kind])}
            yield {
                "png": picture.read_bytes(),
                "txt": caption.encode(),
                "json": json.dumps(described).encode(),
            }


def _talk(caption: str, kind: str) -> list[dict[str, str]]:
    said = (("human", f"<image>\n{WHAT}"), ("gpt", caption), ("human", KIND), ("gpt", kind))
    return [{"from": who, "value": what} for who, what in said]


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not there: this needs a Debian or Ubuntu") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-300:]}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = make_parser("jobs.tuxpaint", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--shard-rows", type=int, default=200, help="samples of a shard")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="of the download")
    options = parser.parse_args(arguments)
    return run_job(lambda: _report(options), failures=(RuntimeError,))


def _report(options: argparse.Namespace) -> None:
    count = write_tuxpaint(options.out, shard_rows=options.shard_rows, cache=options.cache)
    print(f"{count} samples in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
