"""A cluster of its own, started with a token as anyone would, and jobs submitted to it."""

import io
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs.fashion_mnist import make_sample, with_broken, write_shards
from tests.made import save_autoencoder, write_latents

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    """A running `ray start --head`."""

    dashboard: str
    metrics: str
    environment: dict[str, str]

    def submit(self, *command: str) -> subprocess.Popen[str]:
        """Submit a job from the checkout, as the README does; the process ends with the job."""
        return subprocess.Popen(
            [
                str(BIN / "ray"), "job", "submit", "--address", self.dashboard,
                "--working-dir", str(ROOT),
                "--runtime-env-json", '{"excludes": [".venv", ".git", "runs", ".cache", "tests"]}',
                "--", "python", *command,
            ],
            env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def scrape(self) -> dict[str, float]:
        """Read the node's metrics, summed over workers; none before their port is open."""
        try:
            with urllib.request.urlopen(self.metrics) as response:
                lines = response.read().decode().splitlines()
        except urllib.error.URLError:
            return {}
        sums: dict[str, float] = {}
        for line in lines:
            if line.startswith("ray_udiff"):
                name, value = line.rsplit(" ", 1)
                key = name.split("{")[0] + _tag(name, "result")
                sums[key] = sums.get(key, 0) + float(value)
        return sums

    def wait_for(self, *names: str, timeout_s: float = 200) -> dict[str, float]:
        """Scrape until the metrics are there; they arrive some seconds late."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = self.scrape()
            if all(name in found for name in names):
                return found
            time.sleep(0.5)
        pytest.fail(f"no {names} among {sorted(found)}")


def _tag(name: str, tag: str) -> str:
    _, _, rest = name.partition(f'{tag}="')
    return f"[{rest.split(chr(34))[0]}]" if rest else ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    gcs, dashboard, metrics, client, agent = (free_port() for _ in range(5))
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    log = tmp_path_factory.mktemp("cluster") / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [
                str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4",
                "--node-ip-address=127.0.0.1", f"--port={gcs}",
                f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}",
                f"--ray-client-server-port={client}",
                # Its default is one port for all Rays of a machine.
                f"--dashboard-agent-listen-port={agent}", f"--temp-dir=/tmp/udiff-{os.getpid()}",
            ],
            env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    made = Cluster(
        f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", environment
    )
    try:
        wait_until_open(dashboard, head, log)
        yield made
    finally:
        _kill(head)


def _kill(head: subprocess.Popen) -> None:
    """Kill a head and all that it started; a graceful end takes half a minute."""
    processes = [*psutil.Process(head.pid).children(recursive=True), head]
    for process in processes:
        process.kill()
    head.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_open(port: int, head: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert head.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"the dashboard did not open: {log.read_text()}")


def made_shards(folder: Path, pictures: int) -> Path:
    """Write noise pictures, and the seven broken samples of the demo, as one shard."""
    samples = []
    for number in range(pictures):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 32, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        samples.append(make_sample(buffer.getvalue(), f"noise {number}", number % 10))
    write_shards(folder, with_broken(samples), 1000)
    return folder


@dataclass(frozen=True)
class Submitted:
    """Jobs that run side by side on the cluster, and the folders that they write."""

    train: subprocess.Popen[str]
    prepare: subprocess.Popen[str]
    failing: subprocess.Popen[str]
    folder: Path


@pytest.fixture(scope="module")
def submitted(cluster, tmp_path_factory) -> Submitted:
    folder = tmp_path_factory.mktemp("submitted")
    shards = made_shards(folder / "shards", 40)
    (folder / "failing").mkdir()
    (folder / "failing" / "data").write_text("a file where the unit wants a folder")
    save_autoencoder(folder / "autoencoder")
    write_latents(folder / "latents", autoencoder=folder / "autoencoder")
    return Submitted(
        train=cluster.submit(
            "-m", "jobs.train", "--recipe", "ddt/debug", "--run", str(folder / "run"),
            "--workers", "2", f"data.cache={folder / 'latents'}",
            f"autoencoder.path={folder / 'autoencoder'}", "train.images=12_800",
            "network={dim: 64, num_heads: 2, num_blocks: 3, num_encoder_blocks: 2}",
        ),
        prepare=cluster.submit(*prepare(shards, folder / "pictures")),
        failing=cluster.submit(*prepare(shards, folder / "failing")),
        folder=folder,
    )  # fmt: skip


def prepare(shards: Path, output: Path) -> list[str]:
    return [
        "-m", "jobs.prepare", "pictures", "--input", str(shards), "--output", str(output),
        "--size", "32", "--unit-rows", "20", "--workers", "1",
    ]  # fmt: skip


def test_train_is_submitted_and_shows_its_loss(cluster, submitted):
    found = cluster.wait_for("ray_udiff_train_loss", "ray_udiff_train_images_per_s")
    assert 0 < found["ray_udiff_train_loss"] < 10
    assert submitted.train.wait() == 0, submitted.train.stdout.read()
    assert (submitted.folder / "run" / "bundle" / "weights.safetensors").exists()


def test_prepare_is_submitted_and_counts_its_rows(cluster, submitted):
    assert submitted.prepare.wait() == 0, submitted.prepare.stdout.read()
    found = cluster.wait_for("ray_udiff_rows_total[cached]", "ray_udiff_rows_total[rejected]")
    assert found["ray_udiff_rows_total[cached]"] == 41
    assert found["ray_udiff_rows_total[rejected]"] == 6  # without classes no label is wrong


def test_a_job_whose_units_failed_exits_with_an_error(submitted):
    said = submitted.failing.communicate()[0]
    assert submitted.failing.returncode != 0, said
    assert "3 of 3 units failed" in said
    assert not (submitted.folder / "failing" / "manifest.json").exists()
