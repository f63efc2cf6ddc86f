"""The training stream: batches of a cache from any step on, read by each rank for itself."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from udiff.data.manifest import Manifest
from udiff.data.order import BatchPlan, SampleOrder
from udiff.data.schema import FLIPPED, row_column
from udiff.data.storage import Folder
from udiff.data.window import Batch, Columns, RowGroup, WindowReader
from udiff.settings import DataSettings

T = TypeVar("T")

DRAWN, MOMENTS = "latent", ("latent_mean", "latent_logvar")


class Stream:
    """A cache as batches of tensors, in the order of `BatchPlan` and `SampleOrder`.

    A column of encoded texts `<name>` comes as `<name>`, float (rows, max_tokens, width), zero
    behind the end of each text, and `<name>_length`, int64 (rows,). In a cache of drawn latents the
    moments that training reads are those of a distribution without variance.
    """

    def __init__(
        self, cache: Folder, manifest: Manifest, columns: tuple[str, ...], settings: DataSettings
    ) -> None:
        self._cache = cache
        self._is_drawn = "latent_mean" in columns and bool(manifest.all_shapes(DRAWN))
        if self._is_drawn:
            columns = (*(name for name in columns if name not in MOMENTS), DRAWN)
        self._columns = find_columns(cache, manifest, columns, flip=settings.flip)
        self._settings = settings
        names = sorted({file.bucket for file in manifest.files})
        self._buckets = [_Bucket(manifest, name) for name in names]

    def batches(
        self, first_step: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> Generator[dict[str, Tensor], None, None]:
        """Yield this rank's rows of every global batch from `first_step` on, without end.

        Row r of the global batch belongs to rank r mod world_size; all rows are of one bucket. The
        next batches are read by a thread while one is used; closing the generator ends it.
        """
        num_rows = [bucket.num_rows for bucket in self._buckets]
        plan = BatchPlan(num_rows, batch_size=batch_size, seed=seed)
        readers = [self._reader(bucket, seed, sum(num_rows)) for bucket in self._buckets]
        rows = np.arange(rank, batch_size, world_size)

        def read() -> Iterator[dict[str, Tensor]]:
            step = first_step
            while True:
                place = plan.batch(step)
                batch = readers[place.bucket].read(place.start + rows)
                if self._settings.flip:
                    chances = np.random.default_rng([seed, step]).random(batch_size)
                    batch = flip(batch, chances[rows] < 0.5)
                if self._is_drawn:
                    batch = as_moments(batch)
                yield {name: _to_tensor(values) for name, values in batch.items()}
                step += 1

        return prefetch(read, depth=4)

    def _reader(self, bucket: "_Bucket", seed: int, total_rows: int) -> WindowReader:
        # Buckets share the lanes: the memory that windows take does not grow with their number.
        lanes = max(1, round(self._settings.lanes * bucket.num_rows / total_rows))
        order = SampleOrder(
            bucket.sizes,
            seed=seed,
            window_row_groups=self._settings.window_row_groups,
            lanes=lanes,
        )
        return WindowReader(
            self._cache, order, bucket.row_groups, self._columns, capacity=lanes + 2
        )


class _Bucket:
    """The row groups of one bucket."""

    def __init__(self, manifest: Manifest, name: str) -> None:
        self.row_groups = [
            RowGroup(file, number)
            for file in manifest.files
            if file.bucket == name
            for number in range(len(file.row_groups))
        ]
        self.sizes = tuple(group.file.row_groups[group.number] for group in self.row_groups)
        self.num_rows = sum(self.sizes)


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


def flip(batch: Batch, is_flipped: np.ndarray) -> Batch:
    """Take what was made of the mirrored picture where `is_flipped`, and mirror pictures there."""
    chosen = {}
    for name, values in batch.items():
        if name.endswith(FLIPPED):
            continue
        other = values[:, :, ::-1] if name == "image" else batch.get(f"{name}{FLIPPED}")
        where = is_flipped.reshape(-1, *[1] * (values.ndim - 1))
        chosen[name] = values if other is None else np.where(where, other, values)
    return chosen


def as_moments(batch: Batch) -> Batch:
    """Give drawn latents as means, with log variances that leave nothing to draw."""
    rest = {name: values for name, values in batch.items() if name != DRAWN}
    latent = batch[DRAWN]
    return {**rest, "latent_mean": latent, "latent_logvar": np.full_like(latent, -30)}


def find_columns(
    cache: Folder, manifest: Manifest, names: tuple[str, ...], *, flip: bool = False
) -> Columns:
    """Find out how the columns that training wants are stored.

    Args:
        cache: where they are.
        manifest: of the cache.
        names: of the columns.
        flip: add the columns that were made of the mirrored picture.

    Raises:
        ValueError: the cache has no rows, or not all of the columns.
    """
    if not manifest.files:
        raise ValueError(f"data.cache {cache} holds no rows")
    with cache.open(manifest.files[0].path) as file:
        known = set(pq.read_schema(file).names)
    # The states of captions may be called `caption`: training has no use for the strings.
    texts = tuple(name for name in names if row_column(name) in known)
    plain = tuple(name for name in names if name in known and name not in texts)
    if missing := [name for name in names if name not in {*plain, *texts}]:
        raise ValueError(
            f"data.cache {cache} is a cache of {manifest.kind}: it has no column "
            f"{', '.join(missing)}"
        )
    mirrored = tuple(f"{name}{FLIPPED}" for name in plain if f"{name}{FLIPPED}" in known)
    if flip and not mirrored and "image" not in plain:
        raise ValueError(
            f"data.flip needs columns of mirrored pictures, which data.cache {cache} has not: "
            "make it with `python -m jobs.prepare latents --flip`"
        )
    return Columns((*plain, *mirrored) if flip else plain, texts)
