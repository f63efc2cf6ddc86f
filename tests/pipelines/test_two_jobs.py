"""Two jobs at once on one output need no lock: whoever writes a unit writes the same bytes."""

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier

import pytest
from PIL import Image
from pyarrow import fs

from jobs.fashion_mnist import make_sample, with_broken, write_shards
from pipelines.pictures import PicturesChain, PicturesSettings, plan_pictures
from pipelines.source import open_source
from pipelines.stages.write import WriteUnit
from tests.made import draw_pictures
from udiff.data.manifest import finish
from udiff.data.schema import pictures_schema
from udiff.data.storage import open_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_jobs") / "shards"
    samples = []
    for number, picture in enumerate(draw_pictures(20, 32)):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        samples.append(make_sample(file.getvalue(), f"picture {number}", 0))
    write_shards(folder, with_broken(samples), 15)
    return folder


def _run(shards, output, together=nullcontext):
    """Do what a job does; `together` is awaited before anything is written."""
    settings = PicturesSettings(input=str(shards), output=str(output), size=24, unit_rows=4)
    source, folder = open_source(settings.input), open_folder(output)
    together()
    plan = plan_pictures(settings)
    write = WriteUnit(
        folder, schema=pictures_schema((24, 24)), plan=plan.fingerprint, row_group_size=4
    )
    chain = PicturesChain(settings, source, write, made_by=None)
    units = [unit for file in plan.inputs.items() for unit in source.cut(folder, *file, 4)]
    for unit in units:
        together()
        chain(unit)
    together()
    finish(folder, plan, [unit.name for unit in units])


def _files(location):
    folder = open_folder(location)
    selector = fs.FileSelector(folder.path, recursive=True)
    paths = [info.path for info in folder.filesystem.get_file_info(selector) if info.is_file]
    names = [path.removeprefix(folder.path).strip("/") for path in paths]
    return {name: folder.read(name) for name in names}


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_two_jobs_that_write_every_file_at_one_time_make_the_cache_of_one(
    shards, tmp_path, request, place
):
    output = tmp_path / "two" if place == "disk" else request.getfixturevalue("bucket")
    _run(shards, tmp_path / "one")
    together = Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_run, shards, output, together.wait) for _ in range(2)]
        for job in jobs:
            job.result()
    assert _files(output) == _files(tmp_path / "one")
