"""The training stream: batches of a cache from any step on, read by each rank for itself."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from udiff.data.manifest import Manifest
from udiff.data.order import SampleOrder
from udiff.data.schema import column_values
from udiff.data.storage import Folder
from udiff.settings import DataSettings

Columns = dict[str, np.ndarray | pa.Array]
T = TypeVar("T")


class RowGroup(NamedTuple):
    """One row group of one file."""

    path: str
    number: int


class Stream:
    """A cache as batches of tensors, in the order of `SampleOrder`."""

    def __init__(
        self, cache: Folder, manifest: Manifest, columns: tuple[str, ...], settings: DataSettings
    ) -> None:
        missing = [name for name in columns if name not in _known_columns(cache, manifest)]
        if missing:
            raise ValueError(
                f"data.cache {cache} is a cache of {manifest.kind}: it has no column "
                f"{', '.join(missing)}"
            )
        self._cache = cache
        self._columns = columns
        self._settings = settings
        self._row_groups = [
            RowGroup(file.path, number)
            for file in manifest.files
            for number in range(len(file.row_groups))
        ]
        self._sizes = tuple(rows for file in manifest.files for rows in file.row_groups)

    def batches(
        self, first_step: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> Generator[dict[str, Tensor], None, None]:
        """Yield this rank's rows of every global batch from `first_step` on, without end.

        Row r of the global batch belongs to rank r mod world_size. The next batches are read by a
        thread while one is used; closing the generator ends it.
        """
        order = SampleOrder(
            self._sizes,
            seed=seed,
            window_row_groups=self._settings.window_row_groups,
            lanes=self._settings.lanes,
        )
        rows = np.arange(rank, batch_size, world_size)
        reader = _WindowReader(
            self._cache, order, self._row_groups, self._columns, self._settings.lanes
        )

        def read() -> Iterator[dict[str, Tensor]]:
            step = first_step
            while True:
                yield reader.read(step * batch_size + rows)
                step += 1

        return prefetch(read, depth=4)


class _WindowReader:
    """Reads rows by position, and keeps the windows that are in use."""

    def __init__(
        self,
        cache: Folder,
        order: SampleOrder,
        row_groups: list[RowGroup],
        columns: tuple[str, ...],
        lanes: int,
    ) -> None:
        self._cache = cache
        self._order = order
        self._row_groups = row_groups
        self._columns = columns
        self._windows: OrderedDict[tuple[int, int], Columns] = OrderedDict()
        self._capacity = lanes + 2
        self._file = lru_cache(maxsize=lanes)(self._open)

    def read(self, positions: np.ndarray) -> dict[str, Tensor]:
        places = self._order.places(positions)
        keys = np.stack([places.epoch, places.window], 1)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self._columns}
        rows = []
        for epoch, window in np.unique(keys, axis=0).tolist():
            mine = np.flatnonzero((keys == (epoch, window)).all(1))
            rows.append(mine)
            columns = self._window(epoch, window)
            permutation = self._order.window_permutation(epoch, window)
            index = permutation[places.row[mine]]
            for name in self._columns:
                parts[name].append(self._take(columns[name], index, name))
        back = np.argsort(np.concatenate(rows))
        return {name: _to_tensor(np.concatenate(part)[back]) for name, part in parts.items()}

    def _window(self, epoch: int, window: int) -> Columns:
        key = (epoch, window)
        if key not in self._windows:
            if len(self._windows) >= self._capacity:
                self._windows.popitem(last=False)
            self._windows[key] = self._load(epoch, window)
        self._windows.move_to_end(key)
        return self._windows[key]

    def _load(self, epoch: int, window: int) -> Columns:
        groups = [self._row_groups[i] for i in self._order.window_row_groups(epoch, window)]
        tables = [
            self._file(g.path).read_row_group(g.number, columns=list(self._columns)) for g in groups
        ]
        table = pa.concat_tables(tables).combine_chunks()
        self._schema = table.schema
        return {name: self._unpack(table, name) for name in self._columns}

    def _unpack(self, table: pa.Table, name: str) -> np.ndarray | pa.Array:
        # Pictures stay packed until they are wanted.
        if pa.types.is_binary(table.schema.field(name).type):
            return table.column(name).combine_chunks()
        return np.asarray(column_values(table.column(name), table.schema.field(name)))

    def _take(self, column: np.ndarray | pa.Array, index: np.ndarray, name: str) -> np.ndarray:
        if isinstance(column, np.ndarray):
            return column[index]
        return np.asarray(column_values(column.take(pa.array(index)), self._schema.field(name)))

    def _open(self, path: str) -> pq.ParquetFile:
        return pq.ParquetFile(self._cache.open(path))


def prefetch(make: Callable[[], Iterator[T]], *, depth: int) -> Generator[T, None, None]:
    """Run an iterator in a thread, up to `depth` items ahead; its errors are raised here."""
    items: queue.Queue[T | BaseException] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def work() -> None:
        try:
            for item in make():
                if not _put(items, item, closed):
                    return
        except BaseException as error:
            _put(items, error, closed)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()


def _put(items: queue.Queue, item: object, closed: threading.Event) -> bool:
    while not closed.is_set():
        try:
            items.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _to_tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _known_columns(cache: Folder, manifest: Manifest) -> set[str]:
    if not manifest.files:
        raise ValueError(f"data.cache {cache} holds no rows")
    with cache.open(manifest.files[0].path) as file:
        return set(pq.read_schema(file).names)
