"""What Ray and commits cost: `jobs.prepare` against a plain loop that does the same work.

    python -m benchmarks.prepare

Pictures: read, decode, pad and store PNG from web shards. Latents: read and decode PNG, encode with
an autoencoder. The other side does that in two processes without Ray, manifests or commits. Both
are timed from the start of the first piece of work, in turn.
"""

import io
import json
import multiprocessing as mp
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.machine import record, spread
from jobs.console import make_parser
from jobs.fashion_mnist import write_fashion_mnist
from jobs.prepare import prepare_latents, prepare_pictures
from pipelines.latents_settings import LatentsSettings
from pipelines.pictures import PicturesSettings
from tests.made import save_autoencoder
from udiff.bundle import load_autoencoder

PROCESSES = 2


def main() -> None:
    """Measure, and record the ratio of each round."""
    parser = make_parser("benchmarks.prepare", __doc__)
    parser.add_argument("--pictures", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_fashion_mnist(
            folder / "shards", images=options.pictures, held_out=10, shard_rows=2000
        )
        save_autoencoder(folder / "autoencoder")
        rounds = [_round(folder, number) for number in range(options.rounds)]
    figures: dict[str, Any] = {"pictures": options.pictures, "processes": PROCESSES}
    for stage in ("pictures", "latents"):
        for side in ("jobs", "plain"):
            figures[f"{stage}_{side}_per_s"] = spread([r[f"{stage}_{side}"] for r in rounds])
        ratios = [r[f"{stage}_jobs"] / r[f"{stage}_plain"] for r in rounds]
        figures[f"{stage}_ratio"] = spread(ratios)
    record("prepare", figures)


def _round(folder: Path, number: int) -> dict[str, float]:
    out = folder / str(number)
    shards = sorted((folder / "shards" / "train").glob("*.tar"))
    names = tuple(json.loads((folder / "shards" / "classes.json").read_text()))
    pictures = prepare_pictures(
        PicturesSettings(
            input=str(folder / "shards" / "train"),
            output=str(out / "pictures"),
            size=32,
            fit="pad",
            class_names=names,
            workers=PROCESSES,
        )
    )
    latents = prepare_latents(
        LatentsSettings(
            input=str(out / "pictures"),
            output=str(out / "latents"),
            autoencoder=str(folder / "autoencoder"),
            workers=PROCESSES,
        )
    )
    files = sorted((out / "pictures" / "data").glob("*.parquet"))
    return {
        "pictures_jobs": pictures.images_per_s,
        "pictures_plain": run_plain(_store_pictures, shards, (out,)),
        "latents_jobs": latents.images_per_s,
        "latents_plain": run_plain(_encode, files, (out, folder / "autoencoder")),
    }


def run_plain(work: Any, sources: list[Path], arguments: tuple[Any, ...]) -> float:
    """Run a worker per process over its share of the sources; pictures per second of all."""
    context = mp.get_context("spawn")
    ready = context.Barrier(PROCESSES)
    results = context.Queue()
    processes = [
        context.Process(
            target=_process, args=(work, sources[k::PROCESSES], arguments, ready, results)
        )
        for k in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    reports = [results.get() for _ in processes]
    for process in processes:
        process.join()
    started = min(report[0] for report in reports)
    ended = max(report[1] for report in reports)
    return sum(report[2] for report in reports) / (ended - started)


def _process(work: Any, sources: list[Path], arguments: tuple, ready: Any, results: Any) -> None:
    torch.set_num_threads(1)
    do = work(*arguments)
    ready.wait()
    started = time.time()
    count = sum(do(source) for source in sources)
    results.put((started, time.time(), count))


class _store_pictures:  # noqa: N801 (used as a function that has state)
    def __init__(self, out: Path) -> None:
        self._out = out / "plain_pictures"
        self._out.mkdir(exist_ok=True)

    def __call__(self, shard: Path) -> int:
        rows = []
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    data = tar.extractfile(member).read()
                    try:
                        rows.append({"key": member.name, "image": _pad(data)})
                    except Exception:
                        continue
        pq.write_table(pa.Table.from_pylist(rows), self._out / f"{shard.stem}.parquet")
        return len(rows)


def _pad(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > 1_000_000:
            raise ValueError("a bomb")
        padded = Image.new("RGB", (32, 32))
        padded.paste(image.convert("RGB"), (2, 2))
    buffer = io.BytesIO()
    padded.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class _encode:  # noqa: N801
    def __init__(self, out: Path, autoencoder: Path) -> None:
        self._out = out / "plain_latents"
        self._out.mkdir(exist_ok=True)
        self._autoencoder = load_autoencoder(str(autoencoder))

    @torch.inference_mode()
    def __call__(self, file: Path) -> int:
        pictures = pq.read_table(file, columns=["image"]).column("image").to_pylist()
        means = []
        for start in range(0, len(pictures), 32):
            batch = [
                np.asarray(Image.open(io.BytesIO(data))) for data in pictures[start : start + 32]
            ]
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1
            moments = self._autoencoder.encode_moments(pixels)
            means.append(torch.cat([moments.mean, moments.logvar], 1).half().numpy())
        flat = np.concatenate(means).reshape(len(pictures), -1)
        pq.write_table(pa.table({"latent": list(flat)}), self._out / file.name)
        return len(pictures)


if __name__ == "__main__":
    main()
