"""Sources: what the pictures of lists, tables and folders become on their way into a chain."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.pictures import PicturesSettings, _cut, plan_pictures
from pipelines.rows import Refusal
from pipelines.source import open_source
from pipelines.sources.listed import element_bounds
from pipelines.sources.tables import _bounds
from udiff.data.storage import open_folder


def _picture(number, kind="JPEG"):
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _rows(tmp_path, location, *, unit_rows=2, kind=None, pictures=""):
    """Read all units as a chain would; refused rows as their reason."""
    source = open_source(str(location), kind, pictures=str(pictures))
    output = open_folder(tmp_path / "index")
    rows, names = [], []
    for file in source.fingerprints().items():
        for unit in _cut(source, output, *file, unit_rows):
            names.append(unit.name)
            found = [_take(source, row) for row in source.read(unit)]
            assert len(found) == unit.num_samples
            rows += found
    assert len(set(names)) == len(names)
    return rows


def _take(source, row):
    try:
        return source.take(row)
    except Refusal as refusal:
        return {"key": row["key"], "reason": str(refusal.reason)}


def _column(rows, name):
    return [row.get("reason") or row[name] for row in rows]


def _write_pictures(folder, names):
    for number, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_picture(number))


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize("indent", [None, 1])
def test_dual_diffusions_list(tmp_path, indent):
    _write_pictures(tmp_path / "images", ["a/0.jpg", "a/1.jpg", "é/2.jpg"])
    elements = [
        {"image_path": "a/0.jpg", "ratio": 1.3, "height": 12, "width": 16, "caption": "né 日本"},
        {"image_path": "a/1.jpg", "caption": "one", "re_caption": "one, anew"},
        {"image_path": "é/2.jpg", "caption": "", "label": 3},
        {"image_path": "a/gone.jpg", "caption": "gone"},
        {"caption": "names none"},
        {"image_path": "a", "caption": "a folder"},
        "no object",
        {"image_path": "a/0.jpg", "caption": 5},
    ]
    (tmp_path / "list.json").write_text(json.dumps(elements, indent=indent, ensure_ascii=False))
    rows = _rows(tmp_path, tmp_path / "list.json", pictures=tmp_path / "images")
    missing = "read/missing_image"
    assert _column(rows, "caption") == [
        *("né 日本", "one", "", missing, missing, missing, missing, "read/bad_text")
    ]
    assert [row["file"] for row in rows[:3]] == [_picture(n) for n in range(3)]
    assert rows[1]["recaption"] == "one, anew"
    assert rows[0]["metadata"]["ratio"] == 1.3
    assert [row["label"] for row in rows[:3]] == [None, None, 3]
    assert [row["key"] for row in rows[:3]] == ["a/0.jpg", "a/1.jpg", "é/2.jpg"]


def test_llavas_list(tmp_path):
    _write_pictures(tmp_path, ["0.jpg"])
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": " A cat. "},
        {"from": "gpt", "value": "second"},
    ]
    elements = [{"id": "0", "image": "0.jpg", "conversations": turns}, {"id": "1"}]
    (tmp_path / "llava.json").write_text(json.dumps(elements))
    rows = _rows(tmp_path, tmp_path / "llava.json")
    assert _column(rows, "caption") == ["A cat.", "read/missing_image"]


def test_a_list_may_have_a_line_per_element(tmp_path):
    _write_pictures(tmp_path, ["0.jpg", "1.jpg", "2.jpg"])
    lines = [json.dumps({"image": f"{n}.jpg", "caption": str(n)}) for n in range(3)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    assert _column(_rows(tmp_path, tmp_path), "caption") == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[]", "is empty"),
        ('[{"a": 1}, {"b"', "damaged or cut off at byte 11"),
        ('[{"a": 1}, ', "cut off at byte 11"),
        ("hello", "damaged or cut off at byte 0"),
    ],
)
def test_damaged_lists_are_named(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        _rows(tmp_path, tmp_path / "list.json")


_ELEMENTS = st.lists(
    st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.lists(st.floats(0, 1))),
    max_size=8,
)


class _Drip(io.BytesIO):
    """Gives a few bytes at a time, so that elements lie across chunks."""

    def read(self, size=-1):
        return super().read(7)


@given(_ELEMENTS, st.booleans(), st.sampled_from([None, 2]))
def test_elements_are_found_in_the_bytes(elements, ascii_only, indent):
    text = json.dumps(elements, ensure_ascii=ascii_only, indent=indent)
    content = text.encode("utf-8", "surrogatepass")
    bounds = list(element_bounds(_Drip(content)))
    found = [json.loads(content[a:b].decode("utf-8", "surrogatepass")) for a, b in bounds]
    assert found == elements


# ---------------------------------------------------------------- folders


def test_a_folder_per_class(tmp_path):
    names = ["n02/b.JPEG", "n01/a.JPEG", "n01/sub/c.png", "n10/d.webp", "n10/e.jpg"]
    _write_pictures(tmp_path / "in", names)
    (tmp_path / "in" / "n01" / "notes.md").write_text("no picture")
    (tmp_path / "in" / "n01" / "a.txt").write_text(" with a caption\n")
    (tmp_path / "in" / "n10" / "d.webp").write_bytes(b"")
    rows = _rows(tmp_path, tmp_path / "in")
    assert [row["key"] for row in rows] == ["n01/a", "n01/sub/c", "n02/b", "n10/d", "n10/e"]
    assert _column(rows, "label") == [0, 0, 1, "read/empty", 2]
    assert _column(rows, "caption") == ["with a caption", "", "", "read/empty", ""]
    assert rows[0]["file"] == _picture(1)
    assert open_source(str(tmp_path / "in")).class_names == ("n01", "n02", "n10")


def test_classes_in_the_names(tmp_path):
    _write_pictures(tmp_path / "in", ["10_a.jpg", "2_b.jpg", "sub/2_c.png"])
    rows = _rows(tmp_path, tmp_path / "in", kind="names")
    assert _column(rows, "label") == [0, 1, 1]
    assert open_source(str(tmp_path / "in"), "names").class_names == ("10", "2")


def test_a_flat_folder_has_no_classes(tmp_path):
    _write_pictures(tmp_path / "in", ["a.jpg", "b.jpg", "c.jpg"])
    rows = _rows(tmp_path, tmp_path / "in")
    assert _column(rows, "label") == [None] * 3
    assert len({row["key"] for row in rows}) == 3


def test_the_class_names_of_a_folder_go_into_the_cache(tmp_path):
    _write_pictures(tmp_path / "in", ["cat/a.jpg", "dog/b.jpg"])
    plan = plan_pictures(
        PicturesSettings(input=str(tmp_path / "in"), output=str(tmp_path / "out"), size=8)
    )
    assert plan.class_names == ("cat", "dog")


def test_a_changed_folder_has_another_fingerprint(tmp_path):
    _write_pictures(tmp_path / "in", ["cat/a.jpg", "dog/b.jpg"])
    before = open_source(str(tmp_path / "in")).fingerprints()
    (tmp_path / "in" / "dog" / "b.jpg").write_bytes(b"other")
    after = open_source(str(tmp_path / "in")).fingerprints()
    assert before["cat"] == after["cat"]
    assert before["dog"] != after["dog"]


# ---------------------------------------------------------------- tables


def test_a_table_that_datasets_wrote(tmp_path):
    features = Features(
        image=ImageFeature(), text=Value("string"), label=ClassLabel(names=["cat", "dog"])
    )
    pictures = [{"bytes": _picture(n), "path": None} for n in range(5)]
    columns = {"image": pictures, "text": [f"no {n}" for n in range(5)], "label": [0, 1, 1, 0, 1]}
    (tmp_path / "in").mkdir()
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "in" / "train.parquet")
    rows = _rows(tmp_path, tmp_path / "in")
    assert [row["file"] for row in rows] == [_picture(n) for n in range(5)]
    assert _column(rows, "caption") == [f"no {n}" for n in range(5)]
    assert _column(rows, "label") == [0, 1, 1, 0, 1]
    assert open_source(str(tmp_path / "in")).class_names == ("cat", "dog")


def test_a_table_of_plain_bytes_with_holes(tmp_path):
    columns = {"jpg": [_picture(0), None, b""], "captions": [["a", "b"], [], None], "n": [1, 2, 3]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=1)
    rows = _rows(tmp_path, tmp_path / "t.parquet")
    assert _column(rows, "caption") == ["a", "read/missing_image", "read/empty"]
    assert rows[0]["metadata"] == {"captions": ["a", "b"], "n": 1}


@pytest.mark.parametrize(("group", "unit_rows"), [(1, 3), (3, 3), (7, 2), (4, 3), (100, 100)])
def test_every_row_of_a_table_is_read_once(tmp_path, group, unit_rows):
    columns = {"image": [b"x"] * 20, "text": [str(n) for n in range(20)]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=group)
    rows = _rows(tmp_path, tmp_path / "t.parquet", unit_rows=unit_rows)
    assert _column(rows, "caption") == [str(n) for n in range(20)]


@given(st.lists(st.integers(0, 9)), st.integers(1, 6))
def test_bounds_cover_all_rows_and_part_no_small_group(sizes, num_rows):
    bounds = _bounds(sizes, num_rows)
    assert [n for start, stop in bounds for n in range(start, stop)] == [*range(sum(sizes))]
    assert all(0 < stop - start <= num_rows for start, stop in bounds)
    edges = {edge for bound in bounds for edge in bound}
    place = 0
    for size in sizes:
        assert size > num_rows or not edges & {*range(place + 1, place + size)}
        place += size


# ---------------------------------------------------------------- what is there


def test_a_table_of_urls_names_the_job_that_takes_it(tmp_path):
    pq.write_table(pa.table({"url": ["http://a"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"among url; a list of URLs is for `python -m jobs\.down"):
        open_source(str(tmp_path))


def test_what_cannot_be_a_source_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no input folder"):
        open_source(str(tmp_path / "none"))
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file: give its folder"):
        open_source(str(tmp_path / "a.tar"))
    with pytest.raises(FileNotFoundError, match=r"holds no \.parquet"):
        open_source(str(tmp_path), "parquet")
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=r"holds 2 lists \(a.json, b.json\): name one"):
        open_source(str(tmp_path), "json")
    (tmp_path / "a.tar").unlink()
    (tmp_path / "plan.json").touch()
    with pytest.raises(ValueError, match=r"is a cache itself; its pictures are in .*/data"):
        open_source(str(tmp_path))
