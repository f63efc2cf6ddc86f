"""`python -m jobs.serve`, as a user starts it."""

import signal
import socket
import subprocess
import sys

import httpx2
import pytest

from tests.serve.conftest import find_free_port


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.serve", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_serves_until_interrupted(bundle_path):
    port = find_free_port()
    process = start("--bundle", str(bundle_path), "--port", str(port), "--device", "cpu")
    try:
        ready = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in ready, process.stderr.read()
        body = {"prompt": "3", "n": 2}
        answer = httpx2.post(f"http://127.0.0.1:{port}/v1/images/generations", json=body)
        assert len(answer.json()["data"]) == 2
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in errors


def assert_refused(process: subprocess.Popen[str], message: str) -> None:
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors.count("\n") == 1
    assert message in errors


def test_missing_bundle_and_taken_port_are_one_line(bundle_path, tmp_path):
    assert_refused(start("--bundle", str(tmp_path)), "is not a bundle")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = start("--bundle", str(bundle_path), "--port", port)
        assert_refused(process, f"can't listen on 127.0.0.1:{port}")


@pytest.mark.parametrize("option", ["--engines=0", "--port=99999"])
def test_option_out_of_range_is_one_line(bundle_path, option):
    assert_refused(start("--bundle", str(bundle_path), option), "")
