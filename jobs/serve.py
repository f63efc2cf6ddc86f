"""Serve a bundle: images over HTTP, in OpenAI's shape.

    python -m jobs.serve --bundle runs/demo/bundle

Runs until Ctrl-C. `serve run serve.app:build bundle=...` deploys the same application to a cluster.
"""

import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve

from jobs.cluster import connect
from jobs.console import UserError, make_parser, run_job
from serve.app import APP_NAME, Args, build_application
from serve.engine import check_bundle
from serve.proxy import install

PROXY_START_S = 15.0


def serve_bundle(args: Args, *, host: str, port: int) -> None:
    """Start the server, say where it is, and serve until SIGINT or SIGTERM.

    Raises:
        UserError: the port is taken, or Ray Serve already runs elsewhere in this cluster.
        FileNotFoundError, ValueError: there is no bundle, or it can't be served.
    """
    # Here they take one line; in a replica, Serve would try again and again.
    check_bundle(args.bundle)
    _check_port(host, port)
    stop = threading.Event()
    with _serving(args, host=host, port=port):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(_ready_message(f"http://{host}:{port}"), flush=True)
        stop.wait()


@contextmanager
def _serving(args: Args, *, host: str, port: int) -> Iterator[None]:
    """Run the application, and take it down at the end."""
    # What Serve says of its replicas is in Ray's logs; the console is the user's.
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    install()
    connect()
    serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    try:
        _check_listening(host, port)
        serve.run(build_application(args), name=APP_NAME, logging_config=quiet)
        yield
    finally:
        serve.delete(APP_NAME)
        if not serve.status().applications:
            serve.shutdown()
        ray.shutdown()


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"can't listen on {host}:{port}: {error}; choose another --host or --port"
            ) from None


def _check_listening(host: str, port: int) -> None:
    """Tell a Serve that was there before, and keeps its own address, from one that took ours."""
    deadline = time.monotonic() + PROXY_START_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise UserError(
        f"nothing listens on {host}:{port}: Ray Serve seems to run in this cluster already, at "
        "another address, which it keeps; name that with --host and --port, or `serve shutdown`"
    )


def _ready_message(url: str) -> str:
    return (
        f"Serving on {url} (Ctrl-C ends it). For example:\n"
        f"  curl {url}/v1/images/generations -H 'Content-Type: application/json'"
        """ -d '{"prompt": "3", "n": 4, "seed": 0}'"""
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and serve."""
    parser = make_parser("jobs.serve", __doc__)
    parser.add_argument("--bundle", required=True, type=Path, help="folder of the bundle")
    parser.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    parser.add_argument("--model-name", help="name in requests (default: the recipe's family)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--engines", type=int, default=1, help="engine replicas (default: 1)")
    options = parser.parse_args(arguments)

    def job() -> None:
        args = Args(
            # Replicas have working folders of their own.
            bundle=str(options.bundle.absolute()),
            model_name=options.model_name,
            device=options.device,
            num_engines=options.engines,
        )
        serve_bundle(args, host=options.host, port=options.port)

    return run_job(job)


if __name__ == "__main__":
    sys.exit(main())
