"""Bytes of the input that are read again when a job of which 95 % is done is started anew.

    python -m benchmarks.resume

`jobs.prepare pictures` against Ray Data's own job checkpoint (`read_webdataset`, one map,
`write_parquet`), on the same shards in a bucket on this machine. What is counted is what the
bucket's server sends: every byte passes a proxy.
"""

import io
import socket
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import ray
from PIL import Image
from pyarrow import fs
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig

from benchmarks.machine import record
from jobs.cluster import connect
from jobs.console import make_parser
from jobs.prepare import prepare_pictures
from pipelines.pictures import PicturesSettings
from tests.bucket import KEY, SECRET, bucket_server
from udiff.data.storage import open_folder

SHARDS = 20


def main() -> None:
    """Measure, and record the share of the input that is read again."""
    parser = make_parser("benchmarks.resume", __doc__)
    parser.add_argument("--shard-mb", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, bucket_server(Path(name) / "bucket") as uri:
        folder = Path(name)
        total = _write_shards(uri, options.shard_mb)
        connect()
        with _counting(uri) as (counted, sent):
            figures = {
                "input_mb": total / 1e6,
                "ours": _ours(counted, folder, sent) / total,
                "ray_data_checkpoint": _ray_data(counted, folder, sent) / total,
            }
    record("resume", figures)


def _write_shards(uri: str, shard_mb: int) -> int:
    """Put shards of noise into the bucket; gives their bytes."""
    bucket, total = open_folder(uri), 0
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    picture = io.BytesIO()
    Image.fromarray(noise).save(picture, "JPEG", quality=85)
    content = picture.getvalue()
    for shard in range(SHARDS):
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as out:
            for number in range(shard_mb * 1_000_000 // len(content)):
                for extension, data in (("jpg", content), ("txt", b"noise")):
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{extension}")
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))
        bucket.write(f"{shard:05d}.tar", tar.getvalue())
        bucket.write(f"{shard:05d}_stats.json", b"{}")
        total += len(tar.getvalue())
    return total


def _ours(uri: str, folder: Path, sent: "_Sent") -> int:
    """Make a cache, take back its manifest and the commits of a twentieth, and finish it."""
    settings = PicturesSettings(
        input=uri, output=str(folder / "ours"), size=64, jpeg="draft", unit_rows=10
    )
    prepare_pictures(settings)
    entries = sorted((folder / "ours" / "units").glob("*.json"))
    for entry in entries[-(len(entries) // 20) :]:
        entry.unlink()
    (folder / "ours" / "manifest.json").unlink()
    before = sent.num_bytes
    prepare_pictures(settings)
    return sent.num_bytes - before


def _ray_data(uri: str, folder: Path, sent: "_Sent") -> int:
    """Run a job whose last shard fails, then again with that put right."""
    context, broken = DataContext.get_current(), folder / "broken"
    context.checkpoint_config = CheckpointConfig(
        "__key__", str(folder / "checkpoint"), delete_checkpoint_on_success=False
    )
    context.max_errored_blocks = -1
    broken.touch()
    _run_ray_data(uri, folder / "ray", broken)
    broken.unlink()
    before = sent.num_bytes
    _run_ray_data(uri, folder / "ray", broken)
    return sent.num_bytes - before


def _run_ray_data(uri: str, output: Path, broken: Path) -> None:
    parts = urlsplit(uri)
    store = fs.S3FileSystem(
        access_key=KEY,
        secret_key=SECRET,
        scheme="http",
        endpoint_override=parse_qs(parts.query)["endpoint_override"][0],
    )
    paths = [f"tests/folder/{shard:05d}.tar" for shard in range(SHARDS)]

    def shrink(row: dict[str, Any]) -> dict[str, Any]:
        if row["__key__"].startswith(f"{SHARDS - 1:05d}") and broken.exists():
            raise OSError("broken")
        image = Image.open(io.BytesIO(row["jpg"]))
        image.draft("RGB", (64, 64))
        small = io.BytesIO()
        image.resize((64, 64)).save(small, "PNG")
        return {"__key__": row["__key__"], "image": small.getvalue()}

    dataset = ray.data.read_webdataset(
        paths, filesystem=store, decoder=None, override_num_blocks=SHARDS
    )
    dataset.map(shrink).write_parquet(str(output))


# ---------------------------------------------------------------- counting


class _Sent:
    def __init__(self) -> None:
        self.num_bytes = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes


@contextmanager
def _counting(uri: str) -> Iterator[tuple[str, _Sent]]:
    """Give a URI of the same bucket, behind a proxy that counts what the server sends."""
    endpoint = parse_qs(urlsplit(uri).query)["endpoint_override"][0]
    host, _, port = endpoint.partition(":")
    sent, listener = _Sent(), socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, (host, int(port)), sent), daemon=True).start()
    yield uri.replace(endpoint, f"127.0.0.1:{listener.getsockname()[1]}"), sent
    listener.close()


def _accept(listener: socket.socket, server: tuple[str, int], sent: _Sent) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:  # closed
            return
        upstream = socket.create_connection(server)
        for pair in ((client, upstream, None), (upstream, client, sent)):
            threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket, sent: _Sent | None) -> None:
    try:
        while data := source.recv(1 << 16):
            if sent is not None:
                sent.add(len(data))
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # one side has gone
        source.close()
        target.close()


if __name__ == "__main__":
    main()
