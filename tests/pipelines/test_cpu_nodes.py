"""A machine without a GPU reads for one that has: two nodes of Ray, one of which claims a GPU."""

import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipelines.schedule import Readers, Workers, run_units
from pipelines.shards import Unit
from tests.pipelines.test_schedule import PLAN, commit
from udiff.data.manifest import UnitEntry
from udiff.data.storage import Folder, open_folder


@dataclass(frozen=True)
class _Reading:
    folder: Folder

    def __call__(self, unit: Unit) -> str:
        self.folder.write(f"{unit.name}.read", _node())
        return unit.name


@dataclass(frozen=True)
class _Chain:
    folder: Folder

    def __call__(self, unit: Unit) -> UnitEntry:
        raise AssertionError(f"{unit.name} was not read")

    def finish(self, unit: Unit, read: str) -> UnitEntry:
        self.folder.write(f"{read}.encoded", _node())
        return commit(self.folder, unit)


def _node() -> bytes:
    return ray.get_runtime_context().get_node_id().encode()


@pytest.mark.ray
@pytest.mark.long
def test_cpus_of_another_machine_read_for_the_gpu(tmp_path):
    subprocess.run([sys.executable, "-m", __name__, tmp_path], check=True, timeout=280)
    with_gpu, without = ((tmp_path / name).read_text() for name in ("with_gpu", "without"))
    assert with_gpu != without
    for unit in "abc":
        assert (tmp_path / f"{unit}.read").read_text() == without
        assert (tmp_path / f"{unit}.encoded").read_text() == with_gpu


def _run(path: Path) -> None:
    """Run three units; nobody says how many tasks are to read."""
    folder, cluster = open_folder(path), Cluster()
    # The worker takes the only CPU that its node has.
    for name, resources in (
        ("with_gpu", {"num_cpus": 1, "num_gpus": 1}),
        ("without", {"num_cpus": 1}),
    ):
        (path / name).write_text(cluster.add_node(**resources).node_id)
    ray.init(cluster.address)
    run_units(
        partial(_Chain, folder),
        [Unit(name, f"{name}.tar", 1) for name in "abc"],
        folder=folder,
        plan=PLAN,
        stage="made",
        workers=Workers(1, gpus=1),
        readers=Readers(_Reading(folder), None),
    )
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
