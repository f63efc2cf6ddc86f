"""Read rows of a cache in their order, without the training stream."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from udiff.data.manifest import Manifest
from udiff.data.schema import column_values
from udiff.data.storage import Folder


def read_column(
    cache: Folder, manifest: Manifest, name: str, *, num_rows: int
) -> np.ndarray | list[str]:
    """Read the first `num_rows` values of a column.

    Raises:
        ValueError: the cache has fewer rows.
    """
    if num_rows > manifest.num_rows:
        raise ValueError(f"{cache} holds {manifest.num_rows} rows, {num_rows} are wanted")
    tables: list[pa.Table] = []
    for file in manifest.files:
        if sum(len(table) for table in tables) >= num_rows:
            break
        with cache.open(file.path) as source:
            tables.append(pq.read_table(source, columns=[name]))
    table = pa.concat_tables(tables).slice(0, num_rows)
    return column_values(table.column(name), table.schema.field(name))
