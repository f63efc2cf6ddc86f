"""Lists of URLs as they are published, cut into pieces."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.url_list import Columns, _cut, cut_list, list_files
from udiff.data.storage import open_folder

URLS = [f"http://example.org/{n}.jpg" for n in range(5)]
TEXTS = ["a cat", 'say "hi", twice', "two\nlines", None, "日本語"]


def _read(tmp_path, name, *, shard_rows=10, **columns):
    folder, files = list_files(str(tmp_path / name))
    output = open_folder(tmp_path / "out")
    (file,) = files.items()
    pieces = cut_list(folder, output, *file, columns=Columns(**columns), shard_rows=shard_rows)
    tables = [pq.read_table(tmp_path / "out" / "index" / each) for each in pieces.names(name)]
    assert tuple(len(table) for table in tables) == pieces.rows
    return pa.concat_tables(tables, promote_options="permissive").to_pydict()


def _laion(path):
    table = {"SAMPLE_ID": [*range(5)], "URL": URLS, "TEXT": TEXTS, "WIDTH": [640] * 5}
    pq.write_table(pa.table({**table, "similarity": [0.3] * 5}), path, row_group_size=2)


def _relaion(path):
    table = {"url": URLS, "caption": TEXTS, "width": [640] * 5, "punsafe": [0.1] * 5}
    pq.write_table(pa.table(table), path)


def _datacomp(path):
    hashes = [64 * "0"] * 5
    table = {"uid": [*"abcde"], "url": URLS, "text": TEXTS, "original_width": [640] * 5}
    boxes = [[[0.1, 0.2, 0.3, 0.4]]] * 5
    pq.write_table(pa.table({**table, "sha256": hashes, "face_bboxes": boxes}), path)


@pytest.mark.parametrize(
    ("write", "others"),
    [
        (_laion, {"SAMPLE_ID", "list_WIDTH", "similarity"}),
        (_relaion, {"list_width", "punsafe"}),
        (_datacomp, {"uid", "list_original_width", "list_sha256", "face_bboxes"}),
    ],
)
def test_columns_of_known_lists_are_found(tmp_path, write, others):
    write(tmp_path / "part.parquet")
    rows = _read(tmp_path, "part.parquet", shard_rows=2)
    assert (rows.pop("url"), rows.pop("caption")) == (URLS, TEXTS)
    assert set(rows) == others


def test_cc12m_has_no_header_and_quotes_nothing(tmp_path):
    lines = [f'{url}\ta "quoted" word, {n}' for n, url in enumerate(URLS)]
    (tmp_path / "cc12m.tsv").write_text("\n".join(lines))
    rows = _read(tmp_path, "cc12m.tsv")
    assert rows["url"] == URLS
    assert rows["caption"] == [f'a "quoted" word, {n}' for n in range(5)]


def test_cc3m_has_the_caption_first(tmp_path):
    (tmp_path / "cc3m.tsv").write_text("".join(f"text {url}\t{url}\n" for url in URLS))
    rows = _read(tmp_path, "cc3m.tsv")
    assert rows == {"url": URLS, "caption": [f"text {url}" for url in URLS]}


def test_csv_has_quotes_and_a_header(tmp_path):
    content = 'image_url,width,caption\nhttp://a/b,3,"one, two\nlines ""x"""\nhttp://c,,\n'
    (tmp_path / "list.csv.gz").write_bytes(gzip.compress(content.encode("utf-8-sig")))
    assert _read(tmp_path, "list.csv.gz") == {
        "url": ["http://a/b", "http://c"],
        "caption": ['one, two\nlines "x"', ""],
        "list_width": ["3", ""],
    }


def test_json_lines_keep_what_they_have(tmp_path):
    rows = [
        {"url": url, "text": text, "n": n}
        for n, (url, text) in enumerate(zip(URLS, TEXTS, strict=True))
    ]
    rows[1]["n"], rows[2]["tags"] = "one", ["x", {"y": 1}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = _read(tmp_path, "list.jsonl")
    assert (found["url"], found["caption"]) == (URLS, TEXTS)
    assert found["n"] == ["0", "one", "2", "3", "4"]
    assert found["tags"] == [None, None, '["x", {"y": 1}]', None, None]


def test_columns_whose_type_changes_late_become_text(tmp_path):
    rows = [{"url": "u", "n": n if n < 12_000 else [n]} for n in range(15_000)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = _read(tmp_path, "list.jsonl", shard_rows=15_000)
    assert found["n"][:2] + found["n"][-1:] == ["0", "1", "[14999]"]


def test_plain_text_is_an_url_a_line(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(URLS) + "\n")
    assert _read(tmp_path, "list.txt") == {"url": URLS, "caption": [None] * 5}


def test_columns_can_be_named_and_left_out(tmp_path):
    table = {"u": URLS, "alt": TEXTS, "a": [1] * 5, "b": [2] * 5}
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    rows = _read(tmp_path, "list.parquet", url="u", caption="alt", keep=("b",))
    assert rows == {"url": URLS, "caption": TEXTS, "b": [2] * 5}


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("a,b\n1,2\n", {}, "no column of URLs among a, b: --url-column"),
        ("url,b\n1,2\n", {"url": "x"}, r"no column x \(--url-column\) among url, b"),
        ("url,b\n1,2\n", {"sha256": "x"}, r"no column x \(--sha256-column\)"),
        ("url,b\n1,2\n", {"keep": ("x",)}, r"no column x \(--keep\)"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path, content, columns, message):
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, "list.csv", **columns)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.jsonl", b'{"url": "a"}\n{"url"\n', "line 2 is no JSON"),
        ("list.jsonl", b"[1]\n", "line 1 is no JSON object, but a list"),
        ("list.parquet", b"PAR1 no", "list.parquet: "),
        ("list.csv.gz", b"no gzip", "list.csv.gz: "),
    ],
)
def test_damaged_lists_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, name)


def test_what_is_no_list_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        list_files(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="holds no list of URLs"):
        list_files(str(tmp_path))


def test_a_list_is_read_once(tmp_path):
    _laion(tmp_path / "part.parquet")
    first = _read(tmp_path, "part.parquet", shard_rows=2)
    pieces = sorted((tmp_path / "out" / "index").iterdir())
    times = [piece.stat().st_mtime_ns for piece in pieces]
    assert _read(tmp_path, "part.parquet", shard_rows=2) == first
    assert [piece.stat().st_mtime_ns for piece in pieces] == times
    _read(tmp_path, "part.parquet", shard_rows=2, keep=())
    assert [piece.stat().st_mtime_ns for piece in pieces] != times


@given(st.lists(st.integers(0, 7)), st.integers(1, 5))
def test_pieces_are_the_tables_cut_anew(sizes, num_rows):
    values = list(range(sum(sizes)))
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    tables = [pa.table({"x": values[a : a + n]}) for a, n in zip(starts, sizes, strict=True)]
    pieces = [piece["x"].to_pylist() for piece in _cut(iter(tables), num_rows)]
    assert pieces == [values[n : n + num_rows] for n in range(0, len(values), num_rows)]
