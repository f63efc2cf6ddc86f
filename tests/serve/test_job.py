"""`python -m jobs.serve`, as a user starts it."""

import signal
import socket
import subprocess
import sys

import httpx2
import pytest

from jobs.serve import main
from tests.serve.conftest import find_free_port

pytestmark = pytest.mark.ray


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.serve", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
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


def assert_refused(capsys, *arguments: str, message: str = "") -> None:
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert message in said.err


def test_missing_bundle_and_taken_port_are_one_line(bundle_path, tmp_path, capsys):
    assert_refused(capsys, "--bundle", str(tmp_path), message="is not a bundle")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = f"can't listen on 127.0.0.1:{port}"
        assert_refused(capsys, "--bundle", str(bundle_path), "--port", port, message=said)


@pytest.mark.parametrize("option", ["--engines=0", "--port=99999"])
def test_option_out_of_range_is_one_line(bundle_path, capsys, option):
    assert_refused(capsys, "--bundle", str(bundle_path), option)
