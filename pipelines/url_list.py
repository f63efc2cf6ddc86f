"""Lists of URLs with captions and metadata, cut into the rows of a shard each.

Known without being told: LAION (`URL`, `TEXT`), Re-LAION and COYO (`url`, `caption` or `text`),
DataComp (`url`, `text`, `uid`, `sha256`, ...), CC12M and CC3M (tab-separated, no header).
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, BinaryIO, TextIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.json_lines import parse_json_lines
from pipelines.shards import fingerprint_file
from udiff.data.manifest import INDEX, to_json
from udiff.data.storage import Folder, open_file_or_folder
from udiff.settings import Settings

_LIST = re.compile(r"\.(parquet|csv|tsv|txt|jsonl|ndjson|json)(\.gz)?$")
_URL_NAMES = ("url", "image_url", "img_url")
_CAPTION_NAMES = ("caption", "text", "alt_text", "title")
_RESERVED = (
    "url",
    "caption",
    "key",
    "status",
    "error_message",
    "sha256",
    "exif",
    "width",
    "height",
    "original_width",
    "original_height",
)
"""What img2dataset's layout means by these names is the downloaded picture's."""
_READ_AHEAD_BYTES = 1 << 20
_BATCH_ROWS = 10_000

Batch = list[dict[str, Any]]


class Columns(Settings):
    """Which columns of a list are read; empty names are found by what the known lists use."""

    url: str = ""
    caption: str = ""
    sha256: str = ""
    """With a name, pictures must have the hash that is listed there."""
    keep: tuple[str, ...] | None = None
    """Others that go along into the shards; None takes all."""

    @property
    def wanted(self) -> tuple[str, ...] | None:
        """Others, with the one of hashes."""
        if self.keep is None:
            return None
        return tuple(dict.fromkeys((*self.keep, *([self.sha256] if self.sha256 else []))))


class Pieces(Settings):
    """The rows of a list, cut; kept next to the manifest so that the list is read once."""

    fingerprint: str
    columns: Columns
    shard_rows: int
    rows: tuple[int, ...]
    """Of each piece."""

    def names(self, file: str) -> list[str]:
        """Name the files of the pieces, in their order."""
        return [f"{file}-{number:05d}.parquet" for number in range(len(self.rows))]


def list_files(location: str) -> tuple[Folder, dict[str, str]]:
    """Find the lists at a path or URI, a file or a folder, and what tells each from another.

    Raises:
        FileNotFoundError: there is none.
    """
    folder, file = open_file_or_folder(location)
    names = [file] if file else [name for name in folder.names() if _LIST.search(name)]
    if not names:
        raise FileNotFoundError(
            f"{location} holds no list of URLs (*.parquet, *.csv, *.tsv, *.txt, *.jsonl, *.json, "
            "*.csv.gz ...)"
        )
    return folder, {name: fingerprint_file(folder, name) for name in names}


def cut_list(
    folder: Folder,
    output: Folder,
    name: str,
    fingerprint: str,
    *,
    columns: Columns,
    shard_rows: int,
) -> Pieces:
    """Read a list once and keep its rows, `shard_rows` a piece, or find them kept.

    A piece has `url` and `caption`, which may be null, and the other columns; those whose names
    img2dataset's layout uses become `list_<name>`.

    Raises:
        ValueError: the list cannot be read, or has no column of URLs.
    """
    kept, index = output / INDEX, f"{name}.json"
    wanted = {"fingerprint": fingerprint, "columns": columns, "shard_rows": shard_rows}
    if kept.exists(index):
        pieces = Pieces.model_validate_json(kept.read(index))
        if all(getattr(pieces, key) == value for key, value in wanted.items()):
            return pieces
    rows = []
    try:
        for number, table in enumerate(_cut(_tables(folder, name), shard_rows)):
            piece = _normalized(table, columns)
            kept.write(f"{name}-{number:05d}.parquet", _parquet(piece))
            rows.append(len(piece))
    except (ValueError, csv.Error, EOFError, gzip.BadGzipFile) as error:  # ArrowInvalid is one
        raise ValueError(f"list {folder}/{name}: {error}") from error
    pieces = Pieces(**wanted, rows=tuple(rows))
    kept.write(index, to_json(pieces))
    return pieces


def kept_name(column: str) -> str:
    """Name a list's column as it stands in the shards."""
    return f"list_{column}" if column.lower() in _RESERVED else column


# ---------------------------------------------------------------- columns


def _normalized(table: pa.Table, columns: Columns) -> pa.Table:
    url = _find(table, columns.url, _URL_NAMES, "url-column")
    caption = _find(table, columns.caption, _CAPTION_NAMES, "caption-column")
    if url is None:
        raise ValueError(f"no column of URLs among {', '.join(table.column_names)}: --url-column")
    _find(table, columns.sha256, (), "sha256-column")
    for name in columns.wanted or ():
        _find(table, name, (), "keep")
    others = [name for name in table.column_names if name not in (url, caption)]
    if columns.wanted is not None:
        others = [name for name in others if name in columns.wanted]
    texts = pa.nulls(len(table), pa.string()) if caption is None else _text(table[caption])
    named = {"url": _text(table[url]), "caption": texts}
    return pa.table(named | {kept_name(name): table[name] for name in others})


def _find(table: pa.Table, wanted: str, known: Iterable[str], what: str) -> str | None:
    if wanted and wanted not in table.column_names:
        names = ", ".join(table.column_names)
        raise ValueError(f"no column {wanted} (--{what}) among {names}")
    there = {name.lower(): name for name in reversed(table.column_names)}
    return wanted or next((there[name] for name in known if name in there), None)


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string())


# ---------------------------------------------------------------- formats


def _tables(folder: Folder, name: str) -> Iterator[pa.Table]:
    kind = cast(re.Match[str], _LIST.search(name)).group(1)
    with folder.open(name) as file:
        if kind == "parquet":
            for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(_BATCH_ROWS):
                yield pa.Table.from_batches([batch])
            return
        lines = _lines(cast(BinaryIO, file), zipped=name.endswith(".gz"))
        if kind in ("csv", "tsv", "txt"):
            rows = _delimited(lines, kind)
        else:
            rows = (line.value for line in parse_json_lines(lines))
        while batch_rows := list(islice(rows, _BATCH_ROWS)):
            yield _table(batch_rows)


def _lines(file: BinaryIO, *, zipped: bool) -> TextIO:
    stream: Any = io.BufferedReader(cast(io.RawIOBase, file), _READ_AHEAD_BYTES)
    if zipped:
        stream = gzip.GzipFile(fileobj=stream)
    return io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")


def _delimited(lines: TextIO, kind: str) -> Iterator[dict[str, Any]]:
    """Read rows with a header, or without one where the first row holds a URL already."""
    csv.field_size_limit(1 << 30)
    how = {"csv": {}, "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}, "txt": {}}[kind]
    cells = (row for row in csv.reader(lines, **how) if row)  # type: ignore[arg-type]
    if kind == "txt":
        return ({"url": row[0]} for row in ([line.strip()] for line in lines) if row[0])
    first = next(cells, [])
    place = next((n for n, cell in enumerate(first) if re.match(r"https?://", cell)), None)
    if place is None:
        return (dict(zip(first, row, strict=False)) for row in cells)
    names = ["url" if n == place else f"column_{n}" for n in range(len(first))]
    if len(names) == 2:
        names[1 - place] = "caption"
    return (dict(zip(names, row, strict=False)) for row in chain([first], cells))


def _table(rows: Batch) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _array([row.get(name) for row in rows]) for name in names})


def _array(values: list[Any]) -> pa.Array:
    """Keep plain numbers and texts of one type as they are; write all others as JSON."""
    if len({type(value) for value in values if value is not None}) <= 1:
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
            pass
    return _texts(values)


def _texts(values: Iterable[Any]) -> pa.Array:
    plain = (value.as_py() if isinstance(value, pa.Scalar) else value for value in values)
    return pa.array([None if value is None else _as_text(value) for value in plain], pa.string())


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "backslashreplace").decode()


# ---------------------------------------------------------------- pieces


def _cut(tables: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """Cut tables that follow one another into pieces of `num_rows`; the last may have less."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(map(len, held)) >= num_rows:
            together = _together(held)
            yield together.slice(0, num_rows)
            held = [together.slice(num_rows)]
    if any(map(len, held)):
        yield _together(held)


def _together(tables: list[pa.Table]) -> pa.Table:
    """Put tables one after another; as texts, where a column changes its type on the way."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        texts = [pa.table({n: _texts(table[n]) for n in table.column_names}) for table in tables]
        return pa.concat_tables(texts, promote_options="default")


def _parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
