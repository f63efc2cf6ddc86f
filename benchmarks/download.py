"""Downloading: our fetcher against img2dataset's downloader, a shard in a process of its own each.

    python -m benchmarks.download

Clean: pictures that all come at once; both sides keep them as they came (no decoding). Faulty: a
part of the pictures fails in every way that `tests/faulty_server.py` knows; recoverable is what a
second try gets. img2dataset runs with its defaults (no retries, 10 s per read) and, beside it, with
as many retries as we make. A side that has not ended half a minute after the deadline is stopped.
"""

import multiprocessing as mp
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.console import make_parser
from pipelines.tar import walk
from tests.faulty_server import GOOD, PASSING, PERMANENT

CONNECTIONS = 64
TIMEOUT_S, RETRIES = 10, 2
OVERTIME_S = 30


def main() -> None:
    """Measure, and record both sides of each round."""
    from benchmarks.machine import record  # brings torch, which no side's process should import

    parser = make_parser("benchmarks.download", __doc__)
    parser.add_argument("--clean", type=int, default=2000, help="pictures of the clean run")
    parser.add_argument("--faulty", type=int, default=1000, help="URLs of the faulty run")
    parser.add_argument("--side", type=int, default=192, help="pixels of a picture")
    parser.add_argument("--deadline-s", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    figures: dict[str, Any] = {"connections": CONNECTIONS, "deadline_s": options.deadline_s}
    with tempfile.TemporaryDirectory() as name, _server(options.side) as url:
        clean = [f"{url}/ok/{n}" for n in range(options.clean)]
        rounds = [
            [_measure(side, clean, Path(name), options.deadline_s) for side in (_ours, _plain)]
            for _ in range(options.rounds)
        ]
        figures |= _clean_figures(rounds, options.clean)
        for key, side in (("ours", _ours), ("plain", _plain), ("plain_retrying", _retrying)):
            urls = [f"{url}/{fault}/{key}{n}" for n, fault in enumerate(_faults(options.faulty))]
            figures[f"faulty_{key}"] = _measure(side, urls, Path(name), options.deadline_s)
        figures["faulty_recoverable"] = sum(f not in PERMANENT for f in _faults(options.faulty))
    record("download", figures)


def _clean_figures(rounds: list[list[dict[str, Any]]], wanted: int) -> dict[str, Any]:
    from benchmarks.machine import spread

    figures: dict[str, Any] = {}
    for unit in ("wall_s", "cpu_s"):
        figures[f"clean_ratio_{unit}"] = spread([p[unit] / o[unit] for o, p in rounds])
    for number, side in enumerate(("ours", "plain")):
        figures[f"clean_{side}_per_s"] = spread([wanted / r[number]["wall_s"] for r in rounds])
        figures[f"clean_{side}_got"] = spread([r[number]["got"] for r in rounds])
    return figures


def _faults(count: int) -> list[str]:
    """Mix: of ten URLs seven are fine, two pass, one never comes."""
    mixed = []
    for number in range(count):
        kinds: Any = (tuple(PERMANENT), PASSING, PASSING)[number % 10] if number % 10 < 3 else GOOD
        mixed.append(kinds[number // 10 % len(kinds)])
    return mixed


# ---------------------------------------------------------------- the two sides


def _ours(urls: list[str], folder: Path, deadline_s: float) -> Any:
    from pipelines.download import DownloadChain, DownloadSettings, _cut, _units, plan_download
    from pipelines.stages.fetch import FetchSettings
    from pipelines.stages.write_shard import WriteShard
    from pipelines.url_list import list_files
    from udiff.data.manifest import INDEX
    from udiff.data.storage import open_folder

    (folder / "urls.txt").write_text("\n".join(urls))
    fetch = FetchSettings(
        timeout_s=TIMEOUT_S,
        retries=RETRIES,
        deadline_s=deadline_s,
        connections=CONNECTIONS,
        connections_per_host=CONNECTIONS,
        max_bytes=1 << 22,
        allowed_networks=("127.0.0.1/32",),
    )
    settings = DownloadSettings(
        input=str(folder / "urls.txt"), output=str(folder), shard_rows=len(urls), fetch=fetch
    )
    plan = plan_download(settings)
    lists, files = list_files(settings.input)
    output = open_folder(settings.output)
    cuts = {name: _cut(lists, output, name, mark, settings) for name, mark in files.items()}
    write = WriteShard(output, plan=plan.fingerprint, key_digits=5)
    chain = DownloadChain(settings, output / INDEX, write)
    return lambda: chain(_units(cuts)[0])


def _plain(urls: list[str], folder: Path, deadline_s: float, retries: int = 0) -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    table = pa.table({"url": urls, "caption": [None] * len(urls)})
    with pa.ipc.new_file(str(folder / "0.feather"), table.schema) as writer:
        writer.write_table(table)
    download = Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=Resizer(256, "no", False, disable_all_reencoding=True),
        thread_count=CONNECTIONS,
        save_caption=True,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url", "caption"],
        timeout=TIMEOUT_S,
        number_sample_per_shard=len(urls),
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=retries,
        user_agent_token=None,
        disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
    )
    return lambda: download.download_shard((0, str(folder / "0.feather")))


def _retrying(urls: list[str], folder: Path, deadline_s: float) -> Any:
    return _plain(urls, folder, deadline_s, retries=RETRIES)


def _measure(side: Any, urls: list[str], folder: Path, deadline_s: float) -> dict[str, Any]:
    """Run a side in a process of its own; what it got, and how long it took once imported."""
    context = mp.get_context("spawn")
    out, results = Path(tempfile.mkdtemp(dir=folder)), context.Queue()
    process = context.Process(target=_process, args=(side, urls, out, deadline_s, results))
    process.start()
    results.get()  # ready
    process.join(deadline_s + OVERTIME_S)
    if process.is_alive():
        process.kill()
        process.join()
        return {"ended": False, "got": _pictures(out / "00000.tar")}
    return {"ended": True, **results.get(), "got": _pictures(out / "00000.tar")}


def _pictures(tar: Path) -> int:
    """Count the JPEGs of a tar, which may still have been written; other bodies are none."""
    found = 0
    with tar.open("rb") as file, suppress(ValueError):
        for member in walk(file):
            after = file.tell()
            file.seek(member.data)
            found += file.read(2) == b"\xff\xd8"
            file.seek(after)
    return found


def _process(side: Any, urls: list[str], out: Path, deadline_s: float, results: Any) -> None:
    run = side(urls, out, deadline_s)
    results.put("ready")
    started, used = time.perf_counter(), time.process_time()
    run()
    results.put({"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - used})


class _server:  # noqa: N801 (used as a context)
    """The faulty server in a process of its own."""

    def __init__(self, side: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._side = side

    def __enter__(self) -> str:
        options = ("--port", str(self._port), "--side", str(self._side))
        self._process = subprocess.Popen([sys.executable, "-m", "tests.faulty_server", *options])
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port)).close()
            except ConnectionRefusedError:
                time.sleep(0.1)
            else:
                return f"http://127.0.0.1:{self._port}"

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


if __name__ == "__main__":
    main()
