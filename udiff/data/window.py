"""Reads training samples by position, and keeps the windows of row groups that are in use."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from udiff.data.manifest import CacheFile, ParquetFile
from udiff.data.order import SampleOrder
from udiff.data.schema import column_values, padded_texts, row_column
from udiff.data.storage import Folder

Batch = dict[str, np.ndarray]


class RowGroup(NamedTuple):
    """One row group of one file."""

    file: CacheFile
    number: int


class Column(Protocol):
    """A column of a window, as compact as it is stored."""

    def take(self, name: str, index: np.ndarray) -> Batch:
        """Give rows of it, under the names that training knows."""
        ...


@dataclass(frozen=True)
class Columns:
    """What a batch is made of."""

    plain: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def stored(self) -> list[str]:
        """Columns of the data file."""
        return [*self.plain, *map(row_column, self.texts)]


class WindowReader:
    """The rows of a cache, found by their position in an order."""

    def __init__(
        self,
        cache: Folder,
        order: SampleOrder,
        row_groups: Sequence[RowGroup],
        columns: Columns,
        *,
        capacity: int,
    ) -> None:
        self._cache = cache
        self._order = order
        self._row_groups = row_groups
        self._columns = columns
        self._windows: OrderedDict[tuple[int, int], dict[str, Column]] = OrderedDict()
        self._capacity = capacity
        self._file = lru_cache(maxsize=capacity)(self._open)

    def read(self, positions: np.ndarray) -> Batch:
        """Read the samples at positions counted over all epochs."""
        places = self._order.places(positions)
        keys = np.stack([places.epoch, places.window], 1)
        parts: list[Batch] = []
        rows = []
        for epoch, window in np.unique(keys, axis=0).tolist():
            mine = np.flatnonzero((keys == (epoch, window)).all(1))
            rows.append(mine)
            permutation = self._order.window_permutation(epoch, window)
            index = permutation[places.row[mine]]
            part: Batch = {}
            for name, column in self._window(epoch, window).items():
                part |= column.take(name, index)
            parts.append(part)
        back = np.argsort(np.concatenate(rows))
        return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}

    def _window(self, epoch: int, window: int) -> dict[str, Column]:
        key = (epoch, window)
        if key not in self._windows:
            if len(self._windows) >= self._capacity:
                self._windows.popitem(last=False)
            self._windows[key] = self._load(epoch, window)
        self._windows.move_to_end(key)
        return self._windows[key]

    def _load(self, epoch: int, window: int) -> dict[str, Column]:
        groups = [self._row_groups[i] for i in self._order.window_row_groups(epoch, window)]
        tables = [
            self._file(group.file.path).read_row_group(group.number, columns=self._columns.stored)
            for group in groups
        ]
        table = pa.concat_tables(tables).combine_chunks()
        loaded = {name: _load_plain(table, name) for name in self._columns.plain}
        return loaded | self._load_texts([group.file for group in groups], tables)

    def _load_texts(
        self, files: Sequence[CacheFile], tables: Sequence[pa.Table]
    ) -> dict[str, Column]:
        """Load the row groups of encoded texts that a window's rows refer to."""
        loaded: dict[str, Column] = {}
        for name in self._columns.texts:
            parts, rows, start = [], [], 0
            for file, table in zip(files, tables, strict=True):
                assert file.texts is not None
                part, local = self._read_texts(file.texts, name, table[row_column(name)].to_numpy())
                parts.append(part)
                rows.append(local + start)
                start += len(part)
            texts = pa.concat_tables(parts).combine_chunks()
            field = texts.schema.field(name)
            loaded[name] = _Texts(texts[name].combine_chunks(), field, np.concatenate(rows))
        return loaded

    def _read_texts(
        self, file: ParquetFile, name: str, rows: np.ndarray
    ) -> tuple[pa.Table, np.ndarray]:
        """Read the row groups that hold `rows`; returns them, and where the rows are in them."""
        ends = np.cumsum(file.row_groups)
        number_of = np.searchsorted(ends, rows, side="right")
        numbers = np.unique(number_of)
        table = self._file(file.path).read_row_groups(numbers.tolist(), columns=[name])
        sizes = np.asarray(file.row_groups)[numbers]
        before = np.cumsum(sizes) - sizes
        moved = before - (ends[numbers] - sizes)
        return table, rows + moved[np.searchsorted(numbers, number_of)]

    def _open(self, path: str) -> pq.ParquetFile:
        return pq.ParquetFile(self._cache.open(path))


@dataclass(frozen=True)
class _Array:
    values: np.ndarray

    def take(self, name: str, index: np.ndarray) -> Batch:
        return {name: self.values[index]}


@dataclass(frozen=True)
class _Packed:
    """Pictures and packed tensors, which are unpacked when they are wanted."""

    column: pa.Array
    field: pa.Field

    def take(self, name: str, index: np.ndarray) -> Batch:
        return {name: np.asarray(column_values(self.column.take(pa.array(index)), self.field))}


@dataclass(frozen=True)
class _Texts:
    column: pa.LargeBinaryArray
    field: pa.Field
    rows: np.ndarray

    def take(self, name: str, index: np.ndarray) -> Batch:
        texts = padded_texts(self.column.take(pa.array(self.rows[index])), self.field)
        return {name: texts.tokens, f"{name}_length": texts.lengths}


def _load_plain(table: pa.Table, name: str) -> Column:
    column, field = table.column(name).combine_chunks(), table.schema.field(name)
    if pa.types.is_binary(field.type) or pa.types.is_fixed_size_binary(field.type):
        return _Packed(column, field)
    return _Array(np.asarray(column_values(column, field)))
