"""Source: parquet files with a column of pictures, as `datasets` writes them."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rows import Reason, Refusal, Row
from pipelines.shards import Unit, fingerprint_file
from pipelines.stages.read_shard import encodable
from udiff.data.storage import Folder

_IMAGES = ("image", "img", "jpg", "png", "webp", "picture")
_CAPTIONS = ("caption", "text", "captions", "prompt")
_LABELS = ("label", "cls", "fine_label")


@dataclass(frozen=True)
class Tables:
    """The parquet files of a folder; a unit is some of a file's rows."""

    folder: Folder
    names: tuple[str, ...]
    image: str
    class_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Folder, names: Iterable[str]) -> "Tables":
        """Find the column of pictures, and what `datasets` notes of the labels.

        Raises:
            ValueError: no column holds pictures.
        """
        names = tuple(names)
        with folder.open(names[0]) as file:
            schema = pq.read_schema(file)
        image = _find(schema, _IMAGES, _holds_pictures)
        if image is None:
            raise ValueError(
                f"{folder}/{names[0]} has no column of pictures among {', '.join(schema.names)}; "
                "a list of URLs is for `python -m jobs.download`"
            )
        return cls(folder, names, image, _class_names(schema))

    def fingerprints(self) -> dict[str, str]:
        """Tell each file from another of its name."""
        return {name: fingerprint_file(self.folder, name) for name in self.names}

    def cut(self, output: Folder, name: str, fingerprint: str, num_rows: int) -> list[Unit]:
        """Cut a file between its row groups where they are small, else inside them."""
        with self.folder.open(name) as file:
            bounds = _bounds(_group_sizes(file), num_rows)
        return [
            Unit(
                name=f"{name.removesuffix('.parquet')}-{number:05d}",
                source=name,
                num_samples=stop - start,
                start=start,
                stop=stop,
            )
            for number, (start, stop) in enumerate(bounds)
        ]

    def read(self, unit: Unit) -> Iterator[Row]:
        """Read the row groups of a unit, a few rows at a time.

        Writes: key and source (file and number of the row), values (all columns).
        """
        with self.folder.open(unit.source) as file:
            parquet = pq.ParquetFile(file)
            groups, place = _groups(parquet.metadata, unit)
            for batch in parquet.iter_batches(64, row_groups=groups):
                for values in batch.to_pylist():
                    if unit.start <= place < unit.stop:
                        key = f"{unit.source.removesuffix('.parquet')}/{place:09d}"
                        yield {"key": key, "source": f"{unit.source}/{place}", "values": values}
                    place += 1

    def take(self, row: Row) -> Row:
        """Take picture, caption and label.

        Reads: values.
        Writes: file; caption (the first of several); label; metadata (the other columns).
        Refuses: a missing or empty picture, a caption that is no text.
        """
        values = row["values"]
        picture = values.pop(self.image)
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        if content is None:
            raise Refusal(Reason.MISSING_IMAGE, "no bytes")
        if not content:
            raise Refusal(Reason.EMPTY)
        return {
            "key": row["key"],
            "source": row["source"],
            "metadata": values,
            "file": content,
            "caption": _caption(_first(values, _CAPTIONS)),
            "label": _first(values, _LABELS),
        }


def _find(schema: pa.Schema, names: Iterable[str], fits: Any) -> str | None:
    fitting = [field.name for field in schema if fits(field.type)]
    return next((name for name in names if name in fitting), next(iter(fitting), None))


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _class_names(schema: pa.Schema) -> tuple[str, ...]:
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})
    found = (features.get(name, {}).get("names") for name in _LABELS)
    return tuple(next((names for names in found if names), ()))


def _group_sizes(file: pa.NativeFile) -> list[int]:
    metadata = pq.read_metadata(file)
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def _bounds(sizes: Iterable[int], num_rows: int) -> list[tuple[int, int]]:
    """Bound units of at most `num_rows` rows: whole groups, or parts of one."""
    bounds, start, stop = [], 0, 0
    for size in sizes:
        if stop + size - start > num_rows and stop > start:
            bounds.append((start, stop))
            start = stop
        stop += size
        while stop - start > num_rows:
            bounds.append((start, start + num_rows))
            start += num_rows
    return [*bounds, (start, stop)] if stop > start else bounds


def _groups(metadata: pq.FileMetaData, unit: Unit) -> tuple[list[int], int]:
    """Find the row groups that a unit reaches into, and the number of their first row."""
    groups: list[int] = []
    first = place = 0
    for number in range(metadata.num_row_groups):
        size = metadata.row_group(number).num_rows
        if place < unit.stop and place + size > unit.start:
            first = first if groups else place
            groups.append(number)
        place += size
    return groups, first


def _first(values: dict[str, Any], names: Iterable[str]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _caption(value: Any) -> str:
    if isinstance(value, list):
        value = next(iter(value), None)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Refusal(Reason.BAD_TEXT, f"caption is a {type(value).__name__}")
    return encodable(value).strip()
