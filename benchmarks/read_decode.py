"""Read, decode and resize pictures from web shards: `jobs.prepare pictures` against two others.

    python -m benchmarks.read_decode

The others do the same to every picture: Ray Data as its documentation has it (`read_webdataset`,
`map_batches`, `write_parquet`), and a plain loop over the shards in two processes. All three are
timed from the start of the first piece of work: Ray Data by its blocks, so that nobody's start of
processes counts. Pictures are photographs, scaled to 256 pixels and cropped, and stored as PNG.
Memory is what all processes of a job have for themselves (`uss`), at its peak, without Ray's
object store; a sampler reads it four times a second.
"""

import io
import json
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from benchmarks.machine import record, spread
from benchmarks.prepare import PROCESSES, run_plain
from jobs.cluster import connect
from jobs.console import make_parser
from jobs.fetch_testdata import fetch_photographs
from jobs.prepare import prepare_pictures
from pipelines.pictures import PicturesSettings
from pipelines.stages.crop import center_crop

SIZE = 256
_NAMES = ("astronaut", "chelsea", "coffee", "ihc", "motorcycle_left", "hubble_deep_field", "rocket")


def main() -> None:
    """Measure, and record the ratios of each round."""
    parser = make_parser("benchmarks.read_decode", __doc__)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder / "shards", options.pictures, options.shards)
        rounds = [_round(folder, number) for number in range(options.rounds)]
    figures: dict[str, Any] = {"pictures": options.pictures, "shards": options.shards}
    for side in ("jobs", "ray_data", "plain"):
        figures[f"{side}_per_s"] = spread([found[side].per_s for found in rounds])
        figures[f"{side}_peak_mb"] = spread([found[side].peak_bytes / 1e6 for found in rounds])
        figures[f"{side}_cpu_s"] = spread([found[side].cpu_s for found in rounds])
    for other in ("ray_data", "plain"):
        ratios = [found["jobs"].per_s / found[other].per_s for found in rounds]
        figures[f"speed_against_{other}"] = spread(ratios)
    ratios = [found["jobs"].peak_bytes / found["ray_data"].peak_bytes for found in rounds]
    figures["memory_against_ray_data"] = spread(ratios)
    record("read_decode", figures)


@dataclass(frozen=True)
class Run:
    """What one side did."""

    per_s: float
    peak_bytes: int
    cpu_s: float
    """CPU seconds of the processes that were sampled, from start to end."""


def write_shards(folder: Path, num_pictures: int, num_shards: int) -> None:
    """Write shards of photographs, each picture a crop of its own, in img2dataset's layout."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    paths = [next(fetch_photographs().glob(f"{name}.*")) for name in _NAMES]
    photographs = [Image.open(path).convert("RGB") for path in paths]
    for shard in range(num_shards):
        count = len(range(shard, num_pictures, num_shards))
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place in range(count):
                picture = _vary(photographs[draw.integers(len(photographs))], draw)
                for extension, content in (("jpg", picture), ("txt", b"a photograph")):
                    info = tarfile.TarInfo(f"{shard:05d}{place:04d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": count}))


def _vary(photograph: Image.Image, draw: np.random.Generator) -> bytes:
    side = int(min(photograph.size) * draw.uniform(0.6, 1))
    left, top = (int(draw.integers(length - side + 1)) for length in photograph.size)
    file = io.BytesIO()
    cut = photograph.crop((left, top, left + side, top + side))
    cut.resize((512, 384)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _round(folder: Path, number: int) -> dict[str, Run]:
    sides: dict[str, Callable[[Path, Path], float]] = {
        "jobs": _jobs,
        "ray_data": _ray_data,
        "plain": _plain,
    }
    order = list(sides)[number % 3 :] + list(sides)[: number % 3]
    found = {}
    for side in order:
        connect()  # a Ray for each: workers that idle keep what they took
        with _Sampler() as sampler:
            per_s = sides[side](folder / "shards", folder / f"{side}-{number}")
        ray.shutdown()
        found[side] = Run(per_s, sampler.peak_bytes, sampler.cpu_s)
    return found


def _jobs(shards: Path, output: Path) -> float:
    settings = PicturesSettings(
        input=str(shards), output=str(output), size=SIZE, unit_rows=250, workers=PROCESSES
    )
    return prepare_pictures(settings).images_per_s


def _plain(shards: Path, output: Path) -> float:
    return run_plain(_StoreShard, sorted(shards.glob("*.tar")), (output,))


def _ray_data(shards: Path, output: Path) -> float:
    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    started = output.with_suffix(".started")
    started.mkdir()
    dataset = ray.data.read_webdataset(
        paths, decoder=None, suffixes=["jpg", "txt"], override_num_blocks=len(paths)
    )
    work = partial(_shrink_batch, started)
    dataset.map_batches(work, batch_size=32, batch_format="numpy").write_parquet(str(output))
    count = sum(pq.read_metadata(file).num_rows for file in output.glob("*.parquet"))
    first = min(float(file.name) for file in started.iterdir())
    return count / (time.time() - first)


def _shrink_batch(started: Path, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Decode and crop a batch; the first one notes when it began."""
    if not any(started.iterdir()):
        (started / f"{time.time():.6f}").touch()
    images = [shrink(picture) for picture in batch["jpg"]]
    return {"key": batch["__key__"], "caption": batch["txt"], "image": images}


def shrink(picture: bytes) -> bytes:
    """Do to a picture what the stages do."""
    with Image.open(io.BytesIO(picture)) as image:
        cropped = center_crop(image.convert("RGB"), SIZE)
    file = io.BytesIO()
    cropped.save(file, "PNG", compress_level=1)
    return file.getvalue()


class _StoreShard:
    """Carries the pictures of a shard to a parquet file, in a plain process."""

    def __init__(self, output: Path) -> None:
        self._output = output
        output.mkdir(exist_ok=True)

    def __call__(self, shard: Path) -> int:
        rows: list[dict[str, Any]] = []
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".jpg"):
                    rows.append({"key": member.name, "image": shrink(file.read())})
                else:
                    rows[-1]["caption"] = file.read().decode()
        pq.write_table(pa.Table.from_pylist(rows), self._output / f"{shard.stem}.parquet")
        return len(rows)


class _Sampler:
    """Watches this process and all that it has started, Ray's workers too, from a thread."""

    def __enter__(self) -> "_Sampler":
        self.peak_bytes, self.cpu_s = 0, 0.0
        self._over = threading.Event()
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.cpu_s = sum(self._last[pid] - self._first[pid] for pid in self._last)

    def _watch(self) -> None:
        me = psutil.Process(os.getpid())
        while not self._over.wait(0.25):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().uss
                    times = process.cpu_times()
                except psutil.Error:  # it has just ended
                    continue
                self._last[process.pid] = times.user + times.system
                self._first.setdefault(process.pid, self._last[process.pid])
            self.peak_bytes = max(self.peak_bytes, total)


if __name__ == "__main__":
    main()
