"""A cache that is carried over to a changed input is the cache of that input."""

import io
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.fashion_mnist import make_sample, write_shards
from pipelines.pictures import PicturesChain, PicturesSettings, plan_pictures
from pipelines.source import open_source
from pipelines.stages.write import WriteUnit
from pipelines.update import carry_over, find_kept, hash_unit
from udiff.data.manifest import PLAN, committed_units, finish, has_plan
from udiff.data.schema import pictures_schema
from udiff.data.storage import open_folder


def _png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNGS = [_png(seed) for seed in range(4)]


def _write(folder, shards):
    """Write shards, given as lists of (picture, caption); a caption None makes a broken sample."""
    shutil.rmtree(folder, ignore_errors=True)
    samples = [
        make_sample(b"" if caption is None else PNGS[picture], caption or "none", 0)
        for shard in shards
        for picture, caption in shard
    ]
    write_shards(folder, samples, max(1, len(shards[0])))


def _make(shards, output, **changes):
    """Do what `make_pictures` does, without Ray; gives the units that were made."""
    chosen = PicturesSettings(
        input=str(shards), output=str(output), size=16, unit_rows=2, **changes
    )
    source, folder, plan = open_source(chosen.input), open_folder(output), plan_pictures(chosen)
    units = {
        file: source.cut(folder, file, fingerprint, 2) for file, fingerprint in plan.inputs.items()
    }
    if not has_plan(folder, plan):
        kept = find_kept(
            folder, plan, units, lambda asked: [hash_unit(source, unit) for unit in asked]
        )
        carry_over(folder, plan, kept)
    schema = pictures_schema((16, 16))
    write = WriteUnit(folder, schema=schema, plan=plan.fingerprint, row_group_size=4)
    chain, made = PicturesChain(chosen, source, write, made_by=None), []
    wanted = [unit for found in units.values() for unit in found]
    for unit in wanted:
        if unit.name not in committed_units(folder):
            chain(unit)
            made.append(unit.name)
    finish(folder, plan, [unit.name for unit in wanted])
    return made


def _files(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.parent.name != "index"
    }


SHARD = [(n % 4, f"number {n}") for n in range(6)]


def _changed(place, sample):
    return [*SHARD[:place], sample, *SHARD[place + 1 :]]


@pytest.mark.parametrize(
    ("shards", "made"),
    [
        ([_changed(3, (3, "another caption")), SHARD], ["00000-00001"]),
        ([_changed(3, (0, "number 3")), SHARD], ["00000-00001"]),
        ([_changed(3, (3, None)), SHARD], ["00000-00001"]),
        ([SHARD, SHARD[:4]], []),
        ([SHARD, SHARD, SHARD], ["00002-00000", "00002-00001", "00002-00002"]),
        ([SHARD[:]], []),
    ],
)
def test_only_units_that_changed_are_made_again(tmp_path, shards, made):
    _write(tmp_path / "in", [SHARD, SHARD])
    _make(tmp_path / "in", tmp_path / "out")
    _write(tmp_path / "in", shards)
    with pytest.raises(ValueError, match="holds another cache: inputs"):
        _make(tmp_path / "in", tmp_path / "out")
    assert _make(tmp_path / "in", tmp_path / "out", update=True) == made
    _make(tmp_path / "in", tmp_path / "fresh")
    assert _files(tmp_path / "out") == _files(tmp_path / "fresh")
    assert _make(tmp_path / "in", tmp_path / "out") == []


samples = st.tuples(st.integers(0, 3), st.sampled_from(["a", "b", None]))
shard_lists = st.lists(st.lists(samples, min_size=4, max_size=4), min_size=1, max_size=3)


@settings(max_examples=15, deadline=None)
@given(st.lists(shard_lists, min_size=2, max_size=3))
def test_any_change_ends_in_the_cache_of_its_input(tmp_path_factory, inputs):
    folder = tmp_path_factory.mktemp("update")
    for shards in inputs:
        shards[0][0] = (0, "one that is kept")
        _write(folder / "in", shards)
        _make(folder / "in", folder / "out", update=True)
    _make(folder / "in", folder / "fresh")
    assert _files(folder / "out") == _files(folder / "fresh")


def test_an_update_that_is_killed_is_done_again(tmp_path):
    _write(tmp_path / "in", [SHARD, SHARD])
    _make(tmp_path / "in", tmp_path / "out")
    before = _files(tmp_path / "out")
    _write(tmp_path / "in", [_changed(3, (3, "another")), SHARD])
    _make(tmp_path / "in", tmp_path / "out", update=True)
    # As killed before the plan was written, and with an entry that was not yet carried over.
    for name in (PLAN, "units/00000-00000.json", "units/00000-00001.json"):
        (tmp_path / "out" / name).write_bytes(before[name])
    (tmp_path / "out" / "manifest.json").unlink()
    assert _make(tmp_path / "in", tmp_path / "out", update=True) == ["00000-00001"]
    _make(tmp_path / "in", tmp_path / "fresh")
    assert _files(tmp_path / "out") == _files(tmp_path / "fresh")


def test_an_update_changes_nothing_but_inputs(tmp_path):
    _write(tmp_path / "in", [SHARD])
    _make(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match=r"identity\.image\.filters\.min_side"):
        _make(tmp_path / "in", tmp_path / "out", update=True, filters={"min_side": 3})
