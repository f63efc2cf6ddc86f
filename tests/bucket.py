"""A bucket on this machine: SeaweedFS's S3, which checks keys."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pyarrow import fs

KEY, SECRET = "key", "secret"
_CONFIG = {
    "identities": [
        {
            "name": "tests",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
}
_PORTS = ("master.port", "volume.port", "filer.port", "s3.port")
_OFF = ("s3.port.iceberg", "s3.port.lance")


@contextmanager
def bucket_server(folder: Path) -> Iterator[str]:
    """Start a server with one empty bucket; gives its URI, with keys, as `open_folder` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "s3.json").write_text(json.dumps(_CONFIG))
    names = [name for port in _PORTS for name in (port, f"{port}.grpc")]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [
        *(shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed", "server"),
        *(f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"),
        *(f"-s3.config={folder}/s3.json", "-master.volumeSizeLimitMB=64", "-volume.max=20"),
        *("-master.telemetry=false", *(f"-{name}=0" for name in _OFF)),
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        endpoint = f"127.0.0.1:{ports['s3.port']}"
        _make_bucket(endpoint)
        yield f"s3://{KEY}:{SECRET}@tests/folder?endpoint_override={endpoint}&scheme=http"
    finally:
        server.kill()
        server.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _make_bucket(endpoint: str) -> None:
    store = fs.S3FileSystem(
        access_key=KEY,
        secret_key=SECRET,
        endpoint_override=endpoint,
        scheme="http",
        allow_bucket_creation=True,
        connect_timeout=2,
        request_timeout=5,
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            store.create_dir("tests")
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
