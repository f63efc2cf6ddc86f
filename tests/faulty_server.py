"""An HTTP server on this machine that fails in the ways in which hosts of pictures do.

The first part of a path says how (`/hang/12`), the second which picture. Faults that pass, pass at
the second request for the same path.
"""

import argparse
import io
import socket
import string
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

PASSING = ("reset_once", "error_once", "short_once", "busy_once", "hang_once", "reset_midway_once")
"""What a second try gets."""
PERMANENT = {
    "reset": "download/connection",
    "reset_midway": "download/cut_off",
    "hang": "download/timeout",
    "hang_midway": "download/timeout",
    "drip": "download/timeout",
    "drip_headers": "download/timeout",
    "missing": "download/not_found",
    "forbidden": "download/forbidden",
    "teapot": "download/status",
    "error": "download/server_error",
    "html": "download/no_picture",
    "empty": "download/no_picture",
    "short": "download/cut_off",
    "long": "download/connection",
    "huge": "download/too_many_bytes",
    "endless": "download/too_many_bytes",
    "noai": "download/opted_out",
    "other_loopback": "download/address",
    "metadata": "download/address",
    "loop": "download/redirects",
    "file": "download/bad_url",
}
"""What is never got, and why."""
GOOD = ("ok", "redirect", "noai_for_others")
_HTML = b"<!doctype html><html><body><h1>This picture has moved</h1></body></html>"


def draw_jpeg(number: int, side: int = 64) -> bytes:
    """Draw the picture of a number: a JPEG of some 100 bytes per thousand pixels."""
    down, right, phase = np.random.default_rng(number).uniform(0, 8, (3, 3, 1, 1))
    y, x = np.mgrid[0:side, 0:side] / side
    waves = (np.sin(down * y + right * x + phase) + 1) * 127.5
    buffer = io.BytesIO()
    Image.fromarray(waves.astype(np.uint8).transpose(1, 2, 0)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, port: int, side: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.seen: Counter[str] = Counter()
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.pictures = [draw_jpeg(number, side) for number in range(32)]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave early are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.seen[self.path] += 1
            first = self.server.seen[self.path] == 1
        fault, _, number = self.path.strip("/").partition("/")
        if fault.endswith("_once"):
            fault = fault.removesuffix("_once") if first else "ok"
        getattr(self, f"_{fault}", self._missing)(self._picture(number))

    def _picture(self, number: str) -> bytes:
        pictures = self.server.pictures
        return pictures[int(number.lstrip(string.ascii_letters + "_") or 0) % len(pictures)]

    def _send(self, body: bytes, *, status: int = 200, length: int | None = None, **headers: str):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _ok(self, picture: bytes) -> None:
        self._send(picture, Content_Type="image/jpeg")

    def _reset(self, picture: bytes) -> None:
        linger = b"\1\0\0\0\0\0\0\0"  # on, 0 s: closing sends a reset
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def _reset_midway(self, picture: bytes) -> None:
        self._send(picture[:500], length=len(picture))
        time.sleep(0.05)  # or the reset would overtake what was sent
        self._reset(picture)

    def _hang(self, picture: bytes) -> None:
        self.server.closing.wait(60)
        self.close_connection = True

    def _hang_midway(self, picture: bytes) -> None:
        self._send(picture[:500], length=len(picture))
        self._hang(picture)

    def _drip(self, picture: bytes) -> None:
        self._send(b"", length=len(picture))
        self._drip_bytes(picture)

    def _drip_headers(self, picture: bytes) -> None:
        self._drip_bytes(b"HTTP/1.1 200 OK\r\nX-Slow: " + 1000 * b"x")

    def _drip_bytes(self, content: bytes) -> None:
        for place in range(len(content)):
            self.wfile.write(content[place : place + 1])
            self.wfile.flush()
            if self.server.closing.wait(0.2):
                return

    def _missing(self, picture: bytes) -> None:
        self._send(_HTML, status=404)

    def _forbidden(self, picture: bytes) -> None:
        self._send(_HTML, status=403)

    def _teapot(self, picture: bytes) -> None:
        self._send(_HTML, status=418)

    def _error(self, picture: bytes) -> None:
        self._send(_HTML, status=500)

    def _busy(self, picture: bytes) -> None:
        self._send(_HTML, status=429, Retry_After="1")

    def _html(self, picture: bytes) -> None:
        self._send(_HTML, Content_Type="image/jpeg")

    def _empty(self, picture: bytes) -> None:
        self._send(b"")

    def _short(self, picture: bytes) -> None:
        self._send(picture[: len(picture) // 2], length=len(picture))
        self.close_connection = True

    def _long(self, picture: bytes) -> None:
        self._send(picture + bytes(100), length=len(picture), Connection="close")

    def _truncated(self, picture: bytes) -> None:
        self._send(picture[: len(picture) // 2])

    def _huge(self, picture: bytes) -> None:
        self._send(picture, length=1 << 40)
        self.close_connection = True

    def _endless(self, picture: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while not self.server.closing.is_set():
            self.wfile.write(picture + bytes(1 << 16))

    def _noai(self, picture: bytes) -> None:
        self._send(picture, X_Robots_Tag="max-snippet: 5, NoAI")

    def _noai_for_others(self, picture: bytes) -> None:
        self._send(picture, X_Robots_Tag="otherbot: noai, noindex")

    def _redirect(self, picture: bytes) -> None:
        self._send(b"", status=302, Location=self.path.replace("/redirect/", "/ok/"))

    def _loop(self, picture: bytes) -> None:
        self._send(b"", status=302, Location=self.path)

    def _other_loopback(self, picture: bytes) -> None:
        port = self.server.server_port
        self._send(b"", status=301, Location=f"http://127.0.0.2:{port}/ok/1")

    def _metadata(self, picture: bytes) -> None:
        self._send(b"", status=302, Location="http://169.254.169.254/latest/meta-data/")

    def _file(self, picture: bytes) -> None:
        self._send(b"", status=302, Location="file:///etc/passwd")

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def faulty_server(port: int = 0, *, side: int = 64) -> Iterator[str]:
    """Serve on a free port of 127.0.0.1, in threads of this process; gives the base URL."""
    server = _Server(port, side)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def main() -> None:
    """Serve until killed; for measurements, where a server must not share the client's process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--side", type=int, default=64)
    options = parser.parse_args()
    with faulty_server(options.port, side=options.side):
        threading.Event().wait()


if __name__ == "__main__":
    main()
