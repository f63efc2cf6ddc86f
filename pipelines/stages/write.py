"""Stage: the rows of a unit -> its files and, last, its entry, which commits it."""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rows import Row, Rows
from pipelines.shards import Unit
from udiff.data.manifest import (
    DATA,
    REJECTED,
    CacheFile,
    LatentSums,
    UnitEntry,
    latent_sums,
    write_entry,
)
from udiff.data.schema import REJECTED_SCHEMA, field_shape, tensor_column
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


class WriteUnit:
    """Write a unit: rows, then rejected rows, then the entry.

    Reads: the columns of the schema.
    """

    def __init__(
        self, folder: Folder, *, schema: pa.Schema, plan: str, row_group_size: int
    ) -> None:
        self._folder = folder
        self._schema = schema
        self._plan = plan
        self._row_group_size = row_group_size

    def __call__(self, unit: Unit, rows: Rows) -> UnitEntry:
        """Commit a unit; equal rows give equal bytes.

        Raises:
            ValueError: not every sample of the unit is kept or rejected.
        """
        if len(rows.kept) + len(rows.rejected) != unit.num_samples:
            raise ValueError(
                f"unit {unit.name} has {unit.num_samples} samples, but {len(rows.kept)} are kept "
                f"and {len(rows.rejected)} rejected"
            )
        file = self._write_kept(unit, rows.kept) if rows.kept else None
        if rows.rejected:
            columns = [row.columns() for row in rows.rejected]
            table = pa.Table.from_pylist(columns, schema=REJECTED_SCHEMA)
            (self._folder / REJECTED).write(f"{unit.name}.parquet", self._parquet(table))
        entry = UnitEntry(
            unit=unit.name,
            plan=self._plan,
            images_in=unit.num_samples,
            file=file,
            rejected=rows.rejected_counts(),
            latent_sums=_sums(rows.kept),
        )
        write_entry(self._folder, entry)
        return entry

    def _write_kept(self, unit: Unit, rows: Sequence[Row]) -> CacheFile:
        columns = [_column(field, rows) for field in self._schema]
        table = pa.Table.from_arrays(columns, schema=self._schema)
        (self._folder / DATA).write(f"{unit.name}.parquet", self._parquet(table))
        size = self._row_group_size
        groups = tuple(min(size, len(rows) - start) for start in range(0, len(rows), size))
        return CacheFile(path=f"{DATA}/{unit.name}.parquet", rows=len(rows), row_groups=groups)

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


def _column(field: pa.Field, rows: Sequence[Row]) -> pa.Array:
    values = [row[field.name] for row in rows]
    if pa.types.is_fixed_size_list(field.type):
        shape = field_shape(field)
        return tensor_column(field, np.stack(values).reshape(len(rows), *shape))
    return pa.array(values, field.type)


def _sums(rows: Sequence[Row]) -> LatentSums | None:
    if not rows or "latent_mean" not in rows[0]:
        return None
    means = np.stack([row["latent_mean"] for row in rows])
    return latent_sums(means, np.stack([row["latent_logvar"] for row in rows]))
