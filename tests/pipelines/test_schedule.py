"""What Ray does with units whose process dies."""

import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import ray

from jobs.cluster import connect
from pipelines.schedule import FailedUnitsError, Readers, Workers, run_units
from pipelines.shards import Unit
from udiff.data.manifest import CacheFile, Plan, UnitEntry, committed_units, write_entry
from udiff.data.storage import Folder, open_folder

pytestmark = pytest.mark.ray

PLAN = Plan(kind="pictures", identity={}, options={}, inputs={}, shapes={"image": (1, 1, 3)})


@dataclass
class _Chain:
    """Commits units of one row; on `deadly` it kills its process the first `deaths` times."""

    folder: Folder
    deadly: str
    deaths: int

    def __call__(self, unit: Unit) -> UnitEntry:
        attempts = Path(self.folder.path, "attempts")
        attempts.mkdir(exist_ok=True)
        tried = len(list(attempts.glob(f"{unit.name}.*")))
        (attempts / f"{unit.name}.{tried}").touch()
        if unit.name == self.deadly and tried < self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        if unit.name == "raises":
            raise OSError(f"cannot read {self.folder}/{unit.source}")
        return commit(self.folder, unit)


def commit(folder: Folder, unit: Unit) -> UnitEntry:
    """Commit a unit of one row."""
    file = CacheFile(path=unit.source, rows=1, row_groups=(1,))
    entry = UnitEntry(
        unit=unit.name, plan=PLAN.fingerprint, images_in=1, files=(file,), rejected={}
    )
    write_entry(folder, entry)
    return entry


@dataclass
class _Reading:
    """Reads the name of a unit; on `deadly` it kills its process the first time."""

    folder: Folder
    deadly: str = ""

    def __call__(self, unit: Unit) -> str:
        mark = Path(self.folder.path, f"{unit.name}.read")
        if unit.name == "raises":
            raise OSError(f"cannot read {self.folder}/{unit.source}")
        if unit.name == self.deadly and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        mark.touch()
        return unit.name


@dataclass
class _SplitChain(_Chain):
    """Commits a unit only once the `ahead`th unit is read."""

    ahead: str = ""

    def finish(self, unit: Unit, read: str) -> UnitEntry:
        assert read == unit.name
        deadline = time.monotonic() + 60
        while self.ahead and not Path(self.folder.path, f"{self.ahead}.read").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self(unit)


@pytest.fixture(scope="module", autouse=True)
def _ray():
    connect()


def _run(tmp_path, names, deadly="", deaths=0, workers=1):
    folder = open_folder(tmp_path)
    return run_units(
        partial(_Chain, folder, deadly, deaths),
        [Unit(name, f"{name}.tar", 1) for name in names],
        folder=folder,
        plan=PLAN,
        stage="made",
        workers=Workers(workers),
    )


def _run_split(tmp_path, names, *, deadly="", ahead="", readers=1):
    folder = open_folder(tmp_path)
    return run_units(
        partial(_SplitChain, folder, "", 0, ahead),
        [Unit(name, f"{name}.tar", 1) for name in names],
        folder=folder,
        plan=PLAN,
        stage="made",
        workers=Workers(1),
        readers=Readers(_Reading(folder, deadly), readers),
    )


def test_the_next_unit_is_read_while_one_is_encoded(tmp_path):
    report = _run_split(tmp_path, ["a", "b", "c"], ahead="b")
    assert report.manifest.num_rows == report.units_done == 3


def test_without_readers_the_worker_reads_however_many_units_are_run_at_a_time(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("pipelines.schedule._MAX_UNITS", 2)
    report = _run_split(tmp_path, ["a", "b", "c"], ahead="never", readers=0)
    assert report.manifest.num_rows == report.units_done == 3
    assert not list(tmp_path.glob("*.read"))


@pytest.mark.long
def test_a_unit_that_cannot_be_read_fails_alone(tmp_path):
    with pytest.raises(FailedUnitsError, match=r"1 of 3 .* raises \(OSError: cannot read <path>\)"):
        _run_split(tmp_path, ["a", "raises", "c"])
    assert committed_units(open_folder(tmp_path)) == {"a", "c"}


@pytest.mark.long
def test_a_unit_whose_reader_was_killed_is_read_again(tmp_path):
    report = _run_split(tmp_path, ["a", "b", "c"], deadly="b")
    assert report.manifest.num_rows == report.units_done == 3


def test_a_unit_whose_process_was_killed_is_made_again(tmp_path):
    report = _run(tmp_path, ["a", "b", "c"], deadly="b", deaths=1)
    assert report.manifest.num_rows == report.units_done == 3
    assert report.images_per_s > 0


@pytest.mark.long
def test_a_unit_that_always_kills_its_process_fails_alone(tmp_path):
    with pytest.raises(FailedUnitsError, match=r"1 of 4 units failed: b \(its process died\)"):
        _run(tmp_path, ["a", "b", "c", "d"], deadly="b", deaths=99)
    assert committed_units(open_folder(tmp_path)) == {"a", "c", "d"}
    assert len(list((tmp_path / "attempts").glob("b.*"))) == 3


def test_a_unit_that_raises_fails_alone_and_the_next_run_tries_it_again(tmp_path):
    with pytest.raises(FailedUnitsError, match=r"raises \(OSError: cannot read <path>\)"):
        _run(tmp_path, ["a", "raises", "c"])
    assert committed_units(open_folder(tmp_path)) == {"a", "c"}
    with pytest.raises(FailedUnitsError):
        _run(tmp_path, ["a", "raises", "c"])
    assert {file.name for file in (tmp_path / "attempts").iterdir()} == {
        "a.0",
        "c.0",
        "raises.0",
        "raises.1",
    }


def test_more_workers_than_fit_are_refused_at_once(tmp_path):
    room = int(ray.cluster_resources()["CPU"])
    with pytest.raises(ValueError, match=f"the cluster has {room} CPU"):
        _run(tmp_path, ["a"], workers=room + 1)
    with pytest.raises(ValueError, match=f"beside {room} decoders, but the cluster has {room} CPU"):
        _run_split(tmp_path, ["a"], readers=room)
