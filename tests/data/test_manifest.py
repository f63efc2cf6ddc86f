import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udiff.data import manifest
from udiff.data.manifest import (
    CacheFile,
    Plan,
    UnitEntry,
    check_identity,
    committed_units,
    finish,
    identity_difference,
    latent_statistics,
    latent_sums,
    read_manifest,
    start_plan,
    write_entry,
)
from udiff.data.storage import open_folder


def _plan(**changes):
    fields = {
        "kind": "pictures",
        "identity": {"image": {"size": 32, "fit": "pad"}},
        "options": {"unit_rows": 10},
        "inputs": {"00000.tar": "abc"},
        "shapes": {"image": (32, 32, 3)},
    }
    return Plan(**{**fields, **changes})


def _entry(plan, unit, rows=8):
    files = (CacheFile(path=f"data/{unit}.parquet", rows=rows, row_groups=(rows,)),) if rows else ()
    rejected = {"decode/truncated": 10 - rows}
    return UnitEntry(unit=unit, plan=plan.fingerprint, images_in=10, files=files, rejected=rejected)


def test_a_manifest_is_folded_from_the_entries_in_the_order_of_the_plan(tmp_path):
    folder, plan = open_folder(tmp_path), _plan()
    start_plan(folder, plan)
    for unit, rows in (("b", 7), ("a", 8), ("c", 0)):
        write_entry(folder, _entry(plan, unit, rows))
    made = finish(folder, plan, ["a", "b", "c"])
    assert [file.path for file in made.files] == ["data/a.parquet", "data/b.parquet"]
    assert made.images_in == made.num_rows + sum(made.rejected.values()) == 30
    assert read_manifest(tmp_path) == made


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"identity": {"image": {"size": 64, "fit": "pad"}}}, "identity.image.size is 32"),
        ({"options": {"unit_rows": 5}}, "options.unit_rows is 10, wanted 5"),
        ({"inputs": {"00000.tar": "def"}}, "inputs.00000.tar"),
        ({"inputs": {"00000.tar": "abc", "00001.tar": "x"}}, "inputs.00001.tar is missing"),
    ],
)
def test_units_of_another_plan_are_refused_by_name(tmp_path, changes, named):
    folder = open_folder(tmp_path)
    start_plan(folder, _plan())
    write_entry(folder, _entry(_plan(), "a"))
    with pytest.raises(ValueError, match=named):
        start_plan(folder, _plan(**changes))
    start_plan(folder, _plan())


def test_a_plan_under_which_nothing_is_committed_is_replaced(tmp_path):
    folder = open_folder(tmp_path)
    start_plan(folder, _plan())
    start_plan(folder, _plan(options={"unit_rows": 5}))
    assert json.loads(folder.read(manifest.PLAN))["options"] == {"unit_rows": 5}


def test_an_entry_of_another_plan_is_not_folded(tmp_path):
    folder, plan = open_folder(tmp_path), _plan()
    write_entry(folder, _entry(_plan(options={}), "a"))
    assert committed_units(folder) == {"a"}
    with pytest.raises(ValueError, match="another plan"):
        finish(folder, plan, ["a"])


def test_a_cache_without_a_row_is_refused(tmp_path):
    folder, plan = open_folder(tmp_path), _plan()
    write_entry(folder, _entry(plan, "a", rows=0))
    with pytest.raises(ValueError, match="all 10 pictures were rejected"):
        finish(folder, plan, ["a"])
    assert not folder.exists(manifest.MANIFEST)


def test_reading_what_is_not_there_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no cache at .*python -m jobs\.prepare"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        read_manifest(tmp_path)
    start_plan(open_folder(tmp_path), _plan())
    with pytest.raises(FileNotFoundError, match="not finished"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_version_is_refused(tmp_path):
    (tmp_path / manifest.MANIFEST).write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema version 99"):
        read_manifest(tmp_path)


def test_identity_names_each_difference_with_both_values(tmp_path):
    folder, plan = open_folder(tmp_path), _plan()
    write_entry(folder, _entry(plan, "a"))
    made = finish(folder, plan, ["a"])
    check_identity(made, {"image": {"size": 32, "fit": "pad"}})
    check_identity(made, {"image": {"size": 32}})
    with pytest.raises(ValueError, match=r"image\.fit is \"pad\", wanted \"crop\""):
        check_identity(made, {"image": {"size": 32, "fit": "crop"}})
    with pytest.raises(ValueError, match=r"latent\.autoencoder is missing, wanted \"ab\""):
        check_identity(made, {"latent": {"autoencoder": "ab"}})


_SHALLOW = st.dictionaries(st.sampled_from("abc"), st.integers(0, 1))
_IDENTITIES = st.dictionaries(st.sampled_from("abc"), _SHALLOW | st.integers(0, 1))


@given(_IDENTITIES, _IDENTITIES)
def test_identities_differ_exactly_when_a_difference_is_named(one, other):
    assert bool(identity_difference(one, other)) == (one != other)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_statistics_are_those_of_sampled_latents_however_they_are_cut(sizes, seed):
    rng = np.random.default_rng(seed)
    means = rng.normal(2, 3, (sum(sizes), 4, 2, 2)).astype(np.float16)
    logvars = rng.normal(-1, 1, means.shape).astype(np.float16)
    cuts = np.cumsum(sizes)[:-1]
    parts = zip(np.split(means, cuts), np.split(logvars, cuts), strict=True)
    found = latent_statistics(latent_sums(mean, logvar) for mean, logvar in parts)
    mean, variance = means.astype(np.float64), np.exp(logvars.astype(np.float64))
    std = np.sqrt(mean.var((0, 2, 3)) + variance.mean((0, 2, 3)))
    np.testing.assert_allclose(found.mean, mean.mean((0, 2, 3)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.std, std, rtol=1e-9)


def test_statistics_agree_with_samples_drawn():
    rng = np.random.default_rng(0)
    means = rng.normal(1, 2, (400, 2, 8, 8))
    logvars = rng.normal(-0.5, 0.3, means.shape)
    samples = means + np.exp(logvars / 2) * rng.normal(size=means.shape)
    found = latent_statistics([latent_sums(means, logvars)])
    np.testing.assert_allclose(found.std, samples.std((0, 2, 3)), rtol=0.02)
    np.testing.assert_allclose(found.mean, samples.mean((0, 2, 3)), atol=0.03)
