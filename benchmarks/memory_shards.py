"""Peak memory of driver and workers on a hundred times as many shards, over that on a few.

    python -m benchmarks.memory_shards

`jobs.prepare pictures` and then `latents`, on shards of four small pictures each: what grows with
the shards is what is kept of each. Every run has a process and a Ray of its own.
"""

import io
import multiprocessing as mp
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from benchmarks.machine import record
from jobs.console import make_parser
from jobs.fashion_mnist import make_sample, write_shards
from jobs.prepare import prepare_latents, prepare_pictures
from pipelines.latents_settings import LatentsSettings
from pipelines.pictures import PicturesSettings
from tests.made import draw_pictures, save_autoencoder

ROWS = 4
SIZE = 32
_PERIOD_S = 0.2


def main() -> None:
    """Measure, and record the peaks and their ratios."""
    parser = make_parser("benchmarks.memory_shards", __doc__)
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[10, 1000], help="of each run (default: 10 1000)"
    )
    options = parser.parse_args()
    runs = [_in_a_process(count) for count in options.shards]
    figures: dict[str, Any] = {"shards": options.shards, "rows_per_shard": ROWS}
    for name in runs[0]:
        figures[f"{name}_mb"] = [run[name] / 1e6 for run in runs]
        figures[f"{name}_ratio"] = runs[-1][name] / runs[0][name]
    record("memory_shards", figures)


def _in_a_process(num_shards: int) -> dict[str, int]:
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (num_shards,))


def _measure(num_shards: int) -> dict[str, int]:
    """Run both jobs; gives the peak bytes of the driver and of the largest worker in each."""
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_shards(folder / "shards", num_shards)
        save_autoencoder(folder / "autoencoder")
        paths = {kind: str(folder / kind) for kind in ("shards", "pictures", "latents")}
        with _watching(peaks, "pictures"):
            prepare_pictures(
                PicturesSettings(
                    input=paths["shards"], output=paths["pictures"], size=SIZE, workers=1
                )
            )
        with _watching(peaks, "latents"):
            prepare_latents(
                LatentsSettings(
                    input=paths["pictures"],
                    output=paths["latents"],
                    autoencoder=str(folder / "autoencoder"),
                    workers=1,
                )
            )
    return peaks


def _write_shards(folder: Path, num_shards: int) -> None:
    samples = []
    for number, picture in enumerate(draw_pictures(ROWS, SIZE)):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        samples.append(make_sample(file.getvalue(), f"picture {number}", 0))
    write_shards(folder, samples * num_shards, ROWS)


@contextmanager
def _watching(peaks: dict[str, int], job: str) -> Iterator[None]:
    """Note the peaks of this process and of its Ray's workers while the body runs."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(_PERIOD_S):
            workers = [
                process
                for process in psutil.Process().children(recursive=True)
                if "MapWorker" in _name(process)
            ]
            found = max((_peak_bytes(process.pid) for process in workers), default=0)
            peaks[f"{job}_worker"] = max(peaks.get(f"{job}_worker", 0), found)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    peaks[f"{job}_driver"] = _peak_bytes(psutil.Process().pid)


def _name(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return "".join(process.cmdline())
    return ""


def _peak_bytes(pid: int) -> int:
    """Read a process's largest resident size so far; of one that is gone, 0."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
