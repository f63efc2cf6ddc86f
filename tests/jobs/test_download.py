"""`python -m jobs.download` as a user runs it, against a server that fails in every way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs.cluster import connect
from jobs.download import main
from pipelines.sources.tars import Tars
from tests.faulty_server import GOOD, PASSING, PERMANENT, faulty_server
from udiff.data.manifest import read_manifest
from udiff.data.storage import open_folder

ROOT = Path(__file__).parents[2]
SHARDS = 6
FAULTS = [*GOOD, *PASSING, *PERMANENT]
OPTIONS = ("--timeout-s", "1", "--retries", "1", "--pause-s", "0.01", "--max-bytes", "1000000")
OPTIONS += ("--allowed-networks", "127.0.0.1/32", "--shard-rows", str(len(FAULTS)))


def _arguments(urls, output, *more):
    return ["--input", str(urls), "--output", str(output), *OPTIONS, *more]


def _start(urls, output, cluster):
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.download", *_arguments(urls, output, "--workers", "1")],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": cluster},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _files(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def _write_list(path, url):
    urls = [f"{url}/{fault}/{shard}" for shard in range(SHARDS) for fault in FAULTS]
    pq.write_table(
        pa.table({"url": urls, "caption": [f"text {n}" for n in range(len(urls))]}), path
    )
    return path


def test_what_a_user_got_wrong_is_said_in_one_line(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(_arguments(tmp_path / "none.parquet", output)) == 2
    assert "there is nothing at" in capsys.readouterr().err
    assert main(_arguments(tmp_path, output)) == 2
    assert "holds no list of URLs" in capsys.readouterr().err
    (tmp_path / "list.csv").write_text("a,b\n")
    assert main(_arguments(tmp_path, output, "--retries", "-1")) == 2
    assert "retries: Input should be greater than or equal to 0" in capsys.readouterr().err
    assert not output.exists()


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "(default: 10000)" in out
    assert "(default: noai,noimageai,noindex,noimageindex)" in out


# ---------------------------------------------------------------- on Ray


@pytest.fixture(scope="module")
def cluster():
    connect()
    return ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    with faulty_server() as url:
        yield _write_list(tmp_path_factory.mktemp("lists") / "urls.parquet", url)


@pytest.fixture(scope="module")
def undisturbed(urls, cluster, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    assert main(_arguments(urls, output)) == 0
    manifest = read_manifest(output)
    assert manifest.images_in == SHARDS * len(FAULTS)
    assert manifest.num_rows == SHARDS * len(GOOD + PASSING)
    assert manifest.num_rows + sum(manifest.rejected.values()) == manifest.images_in
    return output


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_jobs_and_workers_end_with_the_bytes_of_an_undisturbed_run(
    urls, cluster, undisturbed, tmp_path
):
    job = _start(urls, tmp_path, cluster)
    _wait_for(job, tmp_path, 2)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert job.returncode == -signal.SIGKILL
    job = _start(urls, tmp_path, cluster)
    _wait_for(job, tmp_path, 4)
    assert _kill_workers()
    out, err = job.communicate(timeout=600)
    assert job.returncode == 0, err
    assert f"{SHARDS * len(FAULTS)} URLs, " in out
    assert _files(tmp_path) == _files(undisturbed)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_jobs_at_once_make_one_download(urls, cluster, undisturbed, tmp_path):
    jobs = [_start(urls, tmp_path, cluster) for _ in range(2)]
    for job in jobs:
        _, err = job.communicate(timeout=600)
        assert job.returncode == 0, err
    assert _files(tmp_path) == _files(undisturbed)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_bucket_is_as_good_as_a_disk(urls, cluster, undisturbed, bucket):
    stored, lists = open_folder(bucket), bucket.replace("/folder?", "/lists?")
    open_folder(lists).write(urls.name, urls.read_bytes())
    assert main(_arguments(lists.replace("?", f"/{urls.name}?"), bucket)) == 0
    assert read_manifest(stored) == read_manifest(undisturbed)
    for name, content in _files(undisturbed).items():
        assert stored.read(name) == content
    assert list(Tars(stored).fingerprints()) == [f"{n:05d}.tar" for n in range(SHARDS)]


def _wait_for(job, folder, count):
    while job.poll() is None and len(list(folder.glob("units/[!.]*.json"))) < count:
        time.sleep(0.02)


def _kill_workers():
    """Kill the processes in which this test's Ray runs the chain."""
    workers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "MapWorker" in "".join(process.cmdline())
    ]
    for process in workers:
        process.kill()
    return workers
