"""`python -m jobs.prepare dedup` as a user runs it."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.cluster import connect
from jobs.fetch_testdata import fetch_photographs
from jobs.prepare import main, prepare_dedup
from pipelines.dedup import DedupSettings
from tests.made import write_pictures
from udiff.data.manifest import read_manifest

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A Ray that all jobs of this module share."""
    connect()


def _compressed(picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return np.asarray(Image.open(file))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten photographs, then three of them again as they are and four compressed."""
    names = ("astronaut", "brick", "camera", "chelsea", "clock_motion", "coffee", "coins")
    names += ("grass", "horse", "motorcycle_left")
    files = [fetch_photographs() / f"{name}.png" for name in names]
    once = [Image.open(file).convert("RGB").resize((96, 96)) for file in files]
    arrays = [*map(np.asarray, once), *map(np.asarray, once[:3]), *map(_compressed, once[3:7])]
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, np.stack(arrays), rows_per_file=4)
    return folder


def _files(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize(("method", "dropped"), [("exact", 3), ("perceptual", 7)])
def test_duplicates_are_rejected_for_the_row_that_is_kept(pictures, tmp_path, method, dropped):
    settings = DedupSettings(input=str(pictures), output=str(tmp_path), method=method)
    report = prepare_dedup(settings)
    assert report.manifest.images_in == read_manifest(pictures).num_rows == 17
    assert report.manifest.num_rows == 17 - dropped
    assert report.manifest.rejected == {"dedup/duplicate": dropped}
    rejected = pq.read_table(tmp_path / "rejected").to_pylist()
    pairs = {int(row["key"]): int(row["detail"]) for row in rejected}
    again = {10 + n: n for n in range(dropped)}
    assert pairs == again
    kept = pq.read_table(tmp_path / "data")
    whole = pq.read_table(pictures / "data")
    assert kept == whole.filter([int(key) not in again for key in whole["key"].to_pylist()])


def test_other_parts_and_a_lost_half_make_the_same_cache(pictures, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    prepare_dedup(DedupSettings(input=str(pictures), output=str(one)))
    settings = DedupSettings(input=str(pictures), output=str(other), part_rows=5, workers=1)
    prepare_dedup(settings)
    assert _files(one) == _files(other)
    next(other.glob("duplicates/*/decision.json")).unlink()
    for lost in ("units/00004.json", "manifest.json"):
        (other / lost).unlink()
    (other / "signatures" / "units" / "00008.json").unlink()
    assert prepare_dedup(settings).units_done == 1
    assert _files(one) == _files(other)


def test_another_method_at_the_same_place_is_refused(pictures, tmp_path, capsys):
    arguments = ["dedup", "--input", str(pictures), "--output", str(tmp_path)]
    assert main([*arguments, "--method", "exact"]) == 0
    assert "14 cached" in capsys.readouterr().out
    assert main(arguments) == 2
    assert 'identity.dedup.method is "exact"' in capsys.readouterr().err
    decision = next(tmp_path.glob("duplicates/*/decision.json"))
    assert json.loads(decision.read_text())["dropped"] == 3
    assert main([*arguments, "--method", "embedding"]) == 2
    assert "clip names the model" in capsys.readouterr().err
