"""Stage: the rows of a unit -> its files and, last, its entry, which commits it."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.latents_settings import read_text, states_column
from pipelines.rows import Row, Rows
from pipelines.shards import Unit
from udiff.data.manifest import (
    DATA,
    REJECTED,
    TEXTS,
    CacheFile,
    LatentSums,
    ParquetFile,
    UnitEntry,
    latent_sums,
    write_entry,
)
from udiff.data.packing import pack
from udiff.data.schema import (
    REJECTED_SCHEMA,
    field_dtype,
    field_shape,
    reshaped_field,
    row_column,
    tensor_column,
    texts_schema,
)
from udiff.data.storage import Folder

_PNG_LEVEL = 1  # zlib's default takes twice as long as the decode, for some percent of the bytes


def encode_png(row: Row) -> Row:
    """Store a picture without loss.

    Reads: picture (PIL, RGB).
    Writes: image (PNG bytes); drops picture.
    """
    buffer = io.BytesIO()
    row["picture"].save(buffer, "PNG", compress_level=_PNG_LEVEL)
    rest = {name: value for name, value in row.items() if name != "picture"}
    return {**rest, "image": buffer.getvalue()}


@dataclass(frozen=True)
class TextColumn:
    """A column of encoded texts."""

    field: pa.Field
    """Of the texts file; its name is the column's."""
    source: str
    """Where the text itself is, as `read_text` finds it."""


class WriteUnit:
    """Write a unit: encoded texts, rows, rejected rows, and then the entry.

    In a cache of several sizes each bucket has a file of its own, `<unit>.<bucket>.parquet`, whose
    columns have the bucket's shapes.

    Reads: the columns of the schema; bucket (str) where there are some; of each text column its
    source and `<name>_states`, float (tokens, width), the same of equal texts.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        schema: pa.Schema,
        plan: str,
        row_group_size: int,
        texts: Sequence[TextColumn] = (),
        buckets: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None,
    ) -> None:
        self._folder = folder
        self._has_buckets = bool(buckets)
        self._schemas = {
            name: pa.schema(_in_bucket(field, shapes) for field in schema)
            for name, shapes in (buckets or {"": {}}).items()
        }
        self._texts = texts
        self._plan = plan
        self._row_group_size = row_group_size

    def __call__(self, unit: Unit, rows: Rows, *, content: str = "") -> UnitEntry:
        """Commit a unit; equal rows give equal bytes.

        Args:
            unit: what is committed.
            rows: all its rows.
            content: hash of the rows that it was made from.

        Raises:
            ValueError: not every sample of the unit is kept or rejected.
        """
        if len(rows.kept) + len(rows.rejected) != unit.num_samples:
            raise ValueError(
                f"unit {unit.name} has {unit.num_samples} samples, but {len(rows.kept)} are kept "
                f"and {len(rows.rejected)} rejected"
            )
        files = [
            self._write_kept(unit, bucket, kept)
            for bucket in self._schemas
            if (kept := [row for row in rows.kept if self._bucket(row) == bucket])
        ]
        if rows.rejected:
            columns = [row.columns() for row in rows.rejected]
            table = pa.Table.from_pylist(columns, schema=REJECTED_SCHEMA)
            (self._folder / REJECTED).write(f"{unit.name}.parquet", self._parquet(table))
        entry = UnitEntry(
            unit=unit.name,
            plan=self._plan,
            images_in=unit.num_samples,
            files=tuple(files),
            rejected=rows.rejected_counts(),
            latent_sums=_sums(rows.kept),
            content=content,
        )
        write_entry(self._folder, entry)
        return entry

    def _bucket(self, row: Row) -> str:
        return row["bucket"] if self._has_buckets else ""

    def _write_kept(self, unit: Unit, bucket: str, rows: Sequence[Row]) -> CacheFile:
        name, schema, texts = f"{unit.name}.{bucket}".rstrip("."), self._schemas[bucket], None
        if self._texts:
            rows, table = gather_texts(rows, self._texts)
            texts = self._write(TEXTS, name, table)
        table = pa.Table.from_arrays([_column(field, rows) for field in schema], schema=schema)
        file = self._write(DATA, name, table)
        return CacheFile(**file.model_dump(), bucket=bucket, texts=texts)

    def _write(self, folder: str, name: str, table: pa.Table) -> ParquetFile:
        (self._folder / folder).write(f"{name}.parquet", self._parquet(table))
        size, rows = self._row_group_size, table.num_rows
        groups = tuple(min(size, rows - start) for start in range(0, rows, size))
        return ParquetFile(path=f"{folder}/{name}.parquet", rows=rows, row_groups=groups)

    def _parquet(self, table: pa.Table) -> pa.Buffer:
        sink = pa.BufferOutputStream()
        pq.write_table(
            table,
            sink,
            compression="zstd",
            use_dictionary=False,
            row_group_size=self._row_group_size,
        )
        return sink.getvalue()


def gather_texts(rows: Sequence[Row], columns: Sequence[TextColumn]) -> tuple[list[Row], pa.Table]:
    """Take the encoded texts of rows out, once each in the order of their first use.

    Returns:
        the rows, which say where their texts are, and the table of the texts.
    """
    number: dict[str, int] = {}
    packed: list[dict[int, bytes]] = [{} for _ in columns]
    referring = []
    for row in rows:
        places = {}
        for column, cells in zip(columns, packed, strict=True):
            place = number.setdefault(read_text(row, column.source), len(number))
            if place not in cells:
                tokens = row[states_column(column.field.name)]
                cells[place] = pack(tokens, field_dtype(column.field)).tobytes()
            places[row_column(column.field.name)] = place
        referring.append({**row, **places})
    contents = [[cells.get(place, b"") for place in range(len(number))] for cells in packed]
    schema = texts_schema([column.field for column in columns])
    return referring, pa.table([list(number), *contents], schema=schema)


def _column(field: pa.Field, rows: Sequence[Row]) -> pa.Array:
    values = [row[field.name] for row in rows]
    if shape := _tensor_shape(field):
        return tensor_column(field, np.stack(values).reshape(len(rows), *shape))
    return pa.array(values, field.type)


def _in_bucket(field: pa.Field, shapes: Mapping[str, tuple[int, ...]]) -> pa.Field:
    shape = shapes.get(field.name)
    return field if shape is None else reshaped_field(field, shape)


def _tensor_shape(field: pa.Field) -> tuple[int, ...]:
    is_bytes = pa.types.is_fixed_size_binary(field.type)
    return field_shape(field) if is_bytes or pa.types.is_fixed_size_list(field.type) else ()


def _sums(rows: Sequence[Row]) -> LatentSums | None:
    if not rows or not {"latent_mean", "latent"} & rows[0].keys():
        return None
    if "latent" in rows[0]:
        samples = np.stack([row["latent"] for row in rows])
        return latent_sums(samples, np.full_like(samples, -np.inf))  # samples have no variance
    means = np.stack([row["latent_mean"] for row in rows])
    return latent_sums(means, np.stack([row["latent_logvar"] for row in rows]))
