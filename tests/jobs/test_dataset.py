"""`python -m jobs.dataset`: from a list of URLs to encoded rows, killed again and again."""

import os
import random
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
import yaml

from jobs.cluster import connect
from jobs.console import UserError
from jobs.dataset import main, plan_dataset
from jobs.inspect import main as inspect
from tests.captioner import save_captioner
from tests.faulty_server import GOOD, PASSING, PERMANENT, faulty_server
from tests.made import save_autoencoder, save_t5
from udiff.data.manifest import read_manifest
from udiff.data.storage import open_folder

ROOT = Path(__file__).parents[2]
STEPS = ("download", "pictures", "dedup", "recaption", "latents")
NUM_URLS = 120
KILLS = 10


def test_steps_follow_one_another():
    steps = plan_dataset(
        "list.parquet",
        "s3://bucket/set?region=x",
        {"pictures": {"size": 8}, "latents": {"autoencoder": "a"}},
    )
    assert [step.name for step in steps] == ["download", "pictures", "dedup", "latents"]
    assert steps[0].settings.input == "list.parquet"
    assert steps[3].settings.input == steps[2].settings.output == "s3://bucket/set/dedup?region=x"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"picture": {}}, "picture is no step; the steps are download, pictures"),
        ({"pictures": {}}, "pictures: give either size or buckets"),
        ({"pictures": {"size": 8, "fitt": "crop"}}, "pictures: fitt: Extra inputs"),
        ({"pictures": {"size": 8, "filters": {"min_side": -1}}}, "pictures: filters.min_side:"),
        ({"pictures": {"size": 8, "input": "x"}}, "pictures.input follows from --urls"),
        ({"pictures": 8}, "pictures must be settings or false, got 8"),
        ({"pictures": {"size": 8}, "recaption": {}}, "recaption: model: Field required"),
        ({"pictures": {"size": 8}, "latents": {}}, "latents: nothing to encode"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(keys, message):
    with pytest.raises(UserError, match=message):
        plan_dataset("list.parquet", "out", keys)


@pytest.fixture(scope="module")
def cluster():
    connect()
    return ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """All but --output."""
    folder = tmp_path_factory.mktemp("inputs")
    save_autoencoder(folder / "autoencoder")
    save_t5(folder / "t5")
    keys = {
        "download": {
            "shard_rows": 40,
            "fetch": {
                "timeout_s": 1,
                "retries": 1,
                "pause_s": 0.01,
                "max_bytes": 1_000_000,
                "allowed_networks": ["127.0.0.1/32"],
            },
        },
        "pictures": {"size": 32, "unit_rows": 16},
        "recaption": {"model": save_captioner(folder / "captioner"), "max_tokens": 4},
        "latents": {
            "autoencoder": str(folder / "autoencoder"),
            "texts": [{"encoder": "t5", "path": str(folder / "t5"), "max_tokens": 8}],
        },
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(keys))
    faults = [*GOOD, *PASSING, "truncated", *PERMANENT]
    with faulty_server() as url:
        urls = [f"{url}/{faults[n % len(faults)]}/{n}" for n in range(NUM_URLS)]
        table = pa.table({"url": urls, "caption": [f"text {n}" for n in range(NUM_URLS)]})
        pq.write_table(table, folder / "urls.parquet")
        yield ["--urls", str(folder / "urls.parquet"), "--settings", str(folder / "settings.yaml")]


@pytest.fixture(scope="module")
def undisturbed(arguments, cluster, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    assert main([*arguments, "--output", str(output)]) == 0
    return output


@pytest.mark.long
@pytest.mark.timeout(900)
def test_rows_in_are_rows_out_and_rejected_at_every_step(undisturbed, tmp_path):
    manifests = [read_manifest(open_folder(str(undisturbed / step))) for step in STEPS]
    assert manifests[0].images_in == NUM_URLS
    for before, manifest in zip([None, *manifests], manifests, strict=False):
        assert manifest.images_in == manifest.num_rows + sum(manifest.rejected.values())
        assert before is None or manifest.images_in == before.num_rows
    assert manifests[1].rejected.keys() == {"decode/truncated"}
    assert manifests[2].rejected.keys() == {"dedup/duplicate"}
    assert manifests[4].num_rows > 10
    for step in STEPS:
        page = tmp_path / f"{step}.html"
        assert inspect(["--input", str(undisturbed / step), "--page", str(page)]) == 0
        assert page.stat().st_size > 1000


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_kills_leave_the_bytes_of_an_undisturbed_run(arguments, undisturbed, cluster, tmp_path):
    moments = random.Random(7)
    for number in range(KILLS):
        job = _start(arguments, tmp_path, cluster)
        _wait_for_units(job, tmp_path, _num_units(tmp_path) + moments.randint(0, 1))
        time.sleep(moments.random())
        if number % 2:
            _kill_workers()
        job.send_signal(signal.SIGKILL)
        job.communicate()
    job = _start(arguments, tmp_path, cluster)
    _, err = job.communicate(timeout=900)
    assert job.returncode == 0, err
    assert _files(tmp_path) == _files(undisturbed)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_bucket_is_as_good_as_a_disk(arguments, undisturbed, bucket):
    assert main([*arguments, "--output", bucket]) == 0
    stored = open_folder(bucket)
    for name, content in _files(undisturbed).items():
        assert stored.read(name) == content, name


def _start(arguments, output, cluster):
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.dataset", *arguments, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": cluster},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _num_units(folder):
    return len(list(folder.glob("*/units/[!.]*.json")))


def _wait_for_units(job, folder, count):
    while job.poll() is None and _num_units(folder) < count:
        time.sleep(0.02)


def _kill_workers():
    for process in psutil.Process().children(recursive=True):
        if "MapWorker" in "".join(process.cmdline()):
            process.kill()


def _files(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
