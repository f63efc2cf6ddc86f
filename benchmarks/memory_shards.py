"""Peak memory of driver and workers on a hundred times as many shards, over that on a few.

    python -m benchmarks.memory_shards

`jobs.prepare pictures` and then `latents`, on shards of four small pictures each: what grows with
the shards is what is kept of each. Every run has a process and a Ray of its own.
"""

import io
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from benchmarks.machine import record
from jobs.console import make_parser
from jobs.fashion_mnist import make_sample, write_shards
from tests.made import draw_pictures, save_autoencoder

ROWS = 4
SIZE = 32
_PERIOD_S = 0.02


def main() -> None:
    """Measure, and record the peaks and their ratios."""
    parser = make_parser("benchmarks.memory_shards", __doc__)
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[10, 1000], help="of each run (default: 10 1000)"
    )
    options = parser.parse_args()
    runs = [_measure(count) for count in options.shards]
    figures: dict[str, Any] = {"shards": options.shards, "rows_per_shard": ROWS}
    for name in runs[0]:
        figures[f"{name}_mb"] = [run[name] / 1e6 for run in runs]
        figures[f"{name}_ratio"] = runs[-1][name] / runs[0][name]
    record("memory_shards", figures)


def _measure(num_shards: int) -> dict[str, int]:
    """Run both jobs; gives the peak bytes of the driver and of the largest worker in each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_shards(folder / "shards", num_shards)
        save_autoencoder(folder / "autoencoder")
        pictures = _watch(
            *("pictures", "--input", folder / "shards", "--output", folder / "pictures"),
            *("--size", SIZE, "--workers", 1),
        )
        latents = _watch(
            *("latents", "--input", folder / "pictures", "--output", folder / "latents"),
            *("--autoencoder", folder / "autoencoder", "--workers", 1),
        )
    return pictures | latents


def _write_shards(folder: Path, num_shards: int) -> None:
    samples = []
    for number, picture in enumerate(draw_pictures(ROWS, SIZE)):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        samples.append(make_sample(file.getvalue(), f"picture {number}", 0))
    write_shards(folder, samples * num_shards, ROWS)


def _watch(kind: str, *arguments: object) -> dict[str, int]:
    """Run a job; gives the peak bytes of its process, and of the largest that runs its chain."""
    command = [sys.executable, "-m", "jobs.prepare", kind, *map(str, arguments)]
    job, driver, worker = subprocess.Popen(command, stderr=subprocess.DEVNULL), 0, 0
    looked = 0.0
    while job.poll() is None:
        driver = max(driver, _peak_bytes(job.pid))
        if time.monotonic() > looked + 1:  # all processes of Ray are many
            worker = max(worker, *map(_peak_bytes, [0, *_workers(job.pid)]))
            looked = time.monotonic()
        time.sleep(_PERIOD_S)
    if job.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {job.returncode}")
    return {f"{kind}_driver": driver, f"{kind}_worker": worker}


def _workers(pid: int) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        processes = psutil.Process(pid).children(recursive=True)
        return [process.pid for process in processes if "MapWorker" in _name(process)]
    return []


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
