"""`python -m jobs.prepare` as a user runs it: killed, restarted, and asked for what cannot be."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from jobs.cluster import connect
from jobs.fashion_mnist import CLASS_NAMES, make_sample, with_broken, write_shards
from jobs.prepare import main, prepare_pictures
from pipelines.pictures import PicturesSettings

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    """A Ray that all jobs of this module share."""
    connect()
    return ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two shards of pictures so large that a unit takes a while; some samples are broken."""
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0).integers(0, 256, (90, 110, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((1100, 900)).save(buffer, "JPEG")
    samples = [make_sample(buffer.getvalue(), f"number {n}", n % 10) for n in range(80)]
    write_shards(folder / "shards", with_broken(samples), 50)
    (folder / "classes.json").write_text(json.dumps(CLASS_NAMES))
    return folder


def _settings(data, output, **changes):
    return PicturesSettings(
        **{
            "input": str(data / "shards"),
            "output": str(output),
            "size": 64,
            "unit_rows": 5,
            "class_names": CLASS_NAMES,
            "workers": 1,
            **changes,
        }
    )


def _start(data, output, cluster):
    command = [
        *(sys.executable, "-m", "jobs.prepare", "pictures", "--size", "64", "--unit-rows", "5"),
        *("--input", data / "shards", "--output", output, "--workers", "1"),
        *("--class-names", data / "classes.json"),
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": cluster},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(job, path, pattern, count):
    while job.poll() is None and len(list(path.glob(pattern))) < count:
        time.sleep(0.003)


def _files(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def _committed(folder):
    """Tell the files of committed units from any that were written again."""
    names = [entry.stem for entry in (folder / "units").glob("[!.]*.json")]
    files = [file for name in names for file in folder.rglob(f"{name}.*")]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def test_a_job_killed_again_and_again_makes_the_cache_of_an_undisturbed_one(
    data, cluster, tmp_path
):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    report = prepare_pictures(_settings(data, undisturbed, workers=2))
    assert (report.manifest.images_in, report.manifest.num_rows) == (87, 80)
    assert report.units_done == 18
    committed = {}
    for pattern, count in (("plan.json", 1), ("units/[!.]*.json", 2), ("units/[!.]*.json", 9)):
        job = _start(data, killed, cluster)
        _wait_for(job, killed, pattern, count)
        job.send_signal(signal.SIGKILL)
        job.communicate()
        assert job.returncode == -signal.SIGKILL
        assert committed.items() <= _committed(killed).items()
        committed = _committed(killed)
    job = _start(data, killed, cluster)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert "87 pictures in, 80 cached" in out
    assert 9 <= len({file.stem for file in committed}) < 18
    assert committed.items() <= _committed(killed).items()
    assert _files(killed) == _files(undisturbed)


def test_a_finished_cache_is_left_alone(data, cluster, tmp_path):
    prepare_pictures(_settings(data, tmp_path, unit_rows=50))
    before = _committed(tmp_path)
    report = prepare_pictures(_settings(data, tmp_path, unit_rows=50))
    assert (report.units_done, report.images_per_s) == (0, 0)
    assert _committed(tmp_path) == before


def test_another_plan_at_the_same_place_is_refused(data, cluster, tmp_path, capsys):
    prepare_pictures(_settings(data, tmp_path, unit_rows=50))
    arguments = ["pictures", "--input", str(data / "shards"), "--output", str(tmp_path)]
    capsys.readouterr()
    assert main([*arguments, "--size", "32"]) == 2
    error = capsys.readouterr().err
    assert "identity.image.size is 64, wanted 32" in error
    assert "options.unit_rows is 50, wanted 1000" in error
    assert error.count("\n") == 1


def _unfinished(folder):
    folder.mkdir()
    (folder / "00000.tar").write_bytes(bytes(1024))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no input folder"),
        (lambda folder: folder.mkdir(), "holds no shards"),
        (_unfinished, "00000.tar is not complete: 00000_stats.json"),
    ],
)
def test_what_a_user_got_wrong_is_said_in_one_line(tmp_path, capsys, make, message):
    make(tmp_path / "in")
    output = tmp_path / "out"
    arguments = ["pictures", "--input", str(tmp_path / "in"), "--output", str(output)]
    assert main([*arguments, "--size", "32"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not output.exists()


def test_a_damaged_shard_is_said_in_one_line(data, cluster, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    content = (data / "shards" / "00000.tar").read_bytes()
    (tmp_path / "in" / "00000.tar").write_bytes(content[: len(content) // 2])
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--size", "8"]
    assert main(["pictures", *arguments]) == 2
    error = capsys.readouterr().err
    assert "00000.tar: cut off at byte" in error
    assert error.count("\n") == 1


def test_latents_of_nothing_say_which_command_makes_pictures(tmp_path, capsys):
    arguments = ["--input", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    assert main(["latents", *arguments, "--autoencoder", "vae"]) == 2
    assert "python -m jobs.prepare pictures" in capsys.readouterr().err


def test_wrong_values_name_the_setting(tmp_path, capsys):
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--size", "0"]
    assert main(["pictures", *arguments]) == 2
    assert "error: size: Input should be greater than 0" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pictures", "latents"])
def test_help_names_the_defaults(kind, capsys):
    with pytest.raises(SystemExit) as leave:
        main([kind, "--help"])
    assert leave.value.code == 0
    assert "(default: 256)" in capsys.readouterr().out


def test_rows_and_bytes_are_counted_where_prometheus_reads_them(data, cluster, tmp_path):
    prepare_pictures(_settings(data, tmp_path, unit_rows=50))
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = (
        ("ray_udiff_rows_total{", 'result="rejected"', 'stage="pictures"'),
        ("ray_udiff_bytes_total{", 'stage="pictures"'),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = urllib.request.urlopen(address).read().decode().splitlines()
        if all(any(all(part in line for part in parts) for line in lines) for parts in wanted):
            return
        time.sleep(1)
    pytest.fail(f"no ray_udiff_rows_total and ray_udiff_bytes_total at {address}")
