"""Which rows of a cache are duplicates of which: a function of the signatures alone.

Rows are compared where they share a bucket of some table, and every table is cut into parts, so
that no process holds more than a part. Of a picture's copies the one with the most pixels is kept,
of equal ones the first; what is dropped is a duplicate of the very row that is kept, not of a row
that is dropped itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from udiff.data.storage import Folder

_BLOCK = 2048  # rows that are compared at once
_EMBEDDING_TABLES = 16
_EMBEDDING_BUCKET = 1000
_BITS = 64

Ids = Int64[np.ndarray, " rows"]


class Signatures(NamedTuple):
    """Signatures of some rows, best first: most pixels, then the order of the cache."""

    ids: np.ndarray
    """Place of the row in the whole cache."""
    pixels: np.ndarray
    identity: np.ndarray
    comparable: np.ndarray
    embedding: np.ndarray
    """float16 (rows, width); of width 0 where there are none."""

    def take(self, chosen: np.ndarray | slice) -> "Signatures":
        """Select rows by a mask, a slice, or by their places."""
        return Signatures(*(column[chosen] for column in self))


class Pairs(NamedTuple):
    """Duplicates, int64 (pairs, 4): pixels and id of the better row, then of the worse."""

    equal: np.ndarray
    """Of equal identity; the better row is the best of all that have it."""
    near: np.ndarray
    """Between the best rows of two identities."""


@dataclass(frozen=True)
class Hamming:
    """Perceptual hashes that differ in few bits: those agree on one of `distance + 1` bands."""

    distance: int

    def tables(self, num_rows: int) -> int:
        """Give the number of tables."""
        return self.distance + 1

    def buckets(self, rows: Signatures, table: int, num_rows: int) -> Ids:
        """Give the bucket of each row: its band of bits."""
        low, high = (n * _BITS // (self.distance + 1) for n in (table, table + 1))
        band = rows.identity.view(np.uint64) >> np.uint64(low)
        return (band & np.uint64((1 << (high - low)) - 1)).astype(np.int64)

    def alike(self, rows: Signatures, others: Signatures) -> np.ndarray:
        """Compare all with all: bool (rows, others)."""
        one, other = rows.identity.view(np.uint64), others.identity.view(np.uint64)
        return np.bitwise_count(one[:, None] ^ other[None]) <= self.distance


@dataclass(frozen=True)
class Cosine:
    """Embeddings that point the same way, among those on one side of random planes.

    With as many planes as make buckets of about a thousand rows; a pair at an angle a shares one of
    16 buckets of p planes with a probability of 1 - (1 - (1 - a / pi)^p)^16.
    """

    cosine: float

    def tables(self, num_rows: int) -> int:
        """Give the number of tables."""
        return _EMBEDDING_TABLES if self._num_planes(num_rows) else 1

    def buckets(self, rows: Signatures, table: int, num_rows: int) -> Ids:
        """Give the bucket of each row: the sides that it is on."""
        num_planes, width = self._num_planes(num_rows), rows.embedding.shape[1]
        planes = np.random.default_rng(table).standard_normal((width, num_planes), np.float32)
        sides = rows.embedding.astype(np.float32) @ planes > 0
        return (sides << np.arange(num_planes)).sum(1).astype(np.int64)

    def alike(self, rows: Signatures, others: Signatures) -> np.ndarray:
        """Compare all with all: bool (rows, others)."""
        cosines = rows.embedding.astype(np.float32) @ others.embedding.astype(np.float32).T
        return cosines >= self.cosine

    def _num_planes(self, num_rows: int) -> int:
        return max(0, math.ceil(math.log2(max(1, num_rows) / _EMBEDDING_BUCKET)))


@dataclass(frozen=True)
class Equality:
    """Nothing but equal identities."""

    def tables(self, num_rows: int) -> int:
        """Give the number of tables."""
        return 1

    def buckets(self, rows: Signatures, table: int, num_rows: int) -> Ids:
        """Give the bucket of each row: its identity."""
        return rows.identity

    def alike(self, rows: Signatures, others: Signatures) -> np.ndarray:
        """Compare all with all: bool (rows, others)."""
        return np.zeros((len(rows.ids), len(others.ids)), bool)


Rule = Equality | Hamming | Cosine


@dataclass(frozen=True)
class Files:
    """The signature files of a cache."""

    folder: Folder
    paths: tuple[str, ...]
    starts: tuple[int, ...]
    """Place of the first row of each in the whole cache; and the cache's end."""

    def read(self, number: int) -> Signatures:
        """Read a file."""
        with self.folder.open(self.paths[number]) as file:
            table = pq.read_table(file)
        column = {name: table.column(name).combine_chunks() for name in table.column_names}
        embedding = np.empty((len(table), 0), np.float16)
        if "embedding" in column:
            embedding = column["embedding"].flatten().to_numpy().reshape(len(table), -1)
        return Signatures(
            self.starts[number] + column["row"].to_numpy().astype(np.int64),
            column["pixels"].to_numpy(),
            column["identity"].to_numpy(),
            column["comparable"].to_numpy(zero_copy_only=False),
            embedding,
        )


def find_pairs(files: Files, rule: Rule, table: int, part: int, num_parts: int) -> Pairs:
    """Find the duplicates within one part of one table; holds only that part in memory."""
    rows = _read_part(files, lambda rows: _part(rows, rule, table, files) % num_parts == part)
    first, equal = _collapse(rows)
    best = rows.take(first).take(rows.comparable[first])
    buckets = rule.buckets(best, table, files.starts[-1])
    pairs = [
        _pairs(best, *found)
        for members in _groups(buckets)
        for found in _compare(best, members, rule)
    ]
    near = np.concatenate(pairs) if pairs else np.empty((0, 4), np.int64)
    # Rows of one identity share a part of every table: one of them says so.
    return Pairs(equal if table == 0 else equal[:0], near)


def resolve(found: Sequence[Pairs]) -> tuple[Ids, Ids]:
    """Decide what is dropped: ids of dropped rows in order, and of the kept row for each.

    Best rows first, a row is dropped if it is a duplicate of one that is kept.
    """
    near = np.unique(np.concatenate([pairs.near for pairs in found]), axis=0)
    # By rank of the worse row, then of the better: pixels downward, then ids upward.
    near = near[np.lexsort((near[:, 1], -near[:, 0], near[:, 3], -near[:, 2]))]
    keeper: dict[int, int] = {}
    for better, worse in zip(near[:, 1].tolist(), near[:, 3].tolist(), strict=True):
        if worse not in keeper and better not in keeper:
            keeper[worse] = better
    for _, better, _, worse in np.concatenate([pairs.equal for pairs in found]).tolist():
        keeper[worse] = keeper.get(better, better)
    dropped = np.array(sorted(keeper), np.int64)
    return dropped, np.array([keeper[row] for row in dropped.tolist()], np.int64)


def _part(rows: Signatures, rule: Rule, table: int, files: Files) -> np.ndarray:
    """Spread buckets over parts; what is not comparable goes by its identity."""
    buckets = rule.buckets(rows, table, files.starts[-1])
    return np.where(rows.comparable, buckets, rows.identity)


def _read_part(files: Files, wanted: Callable[[Signatures], np.ndarray]) -> Signatures:
    parts = []
    for number in range(len(files.paths)):
        rows = files.read(number)
        parts.append(rows.take(wanted(rows)))
    rows = Signatures(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return rows.take(np.lexsort((rows.ids, -rows.pixels)))


def _collapse(rows: Signatures) -> tuple[np.ndarray, np.ndarray]:
    """Find the best row of each identity, and pair the others with it."""
    kinds = np.stack([rows.identity, rows.comparable.astype(np.int64)], 1)
    _, first, place = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    best = first[place.reshape(-1)]
    others = np.flatnonzero(best != np.arange(len(best)))
    return np.sort(first), _pairs(rows, best[others], others)


def _pairs(rows: Signatures, better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    columns = (rows.pixels[better], rows.ids[better], rows.pixels[worse], rows.ids[worse])
    return np.stack(columns, 1).astype(np.int64)


def _groups(buckets: np.ndarray) -> Iterator[np.ndarray]:
    """Give the places of the rows of each bucket, in order."""
    order = np.argsort(buckets, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(buckets[order])) + 1)


def _compare(
    rows: Signatures, members: np.ndarray, rule: Rule
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give places of better and worse rows of the pairs within a bucket, a block at a time."""
    for start in range(0, len(members), _BLOCK):
        block, rest = slice(start, start + _BLOCK), slice(start, None)
        alike = rule.alike(rows.take(members[block]), rows.take(members[rest]))
        better, worse = np.nonzero(np.triu(alike, k=1))
        yield members[start + better], members[start + worse]


def drop_lists(files: Files, dropped: Ids, kept: Ids) -> Iterator[tuple[str, pa.Table]]:
    """Give per path the rows to drop, and the key of the row that is kept for each."""
    keys = _keys(files, np.unique(kept))
    bounds = np.searchsorted(dropped, files.starts)
    for number, (start, stop) in enumerate(pairwise(bounds.tolist())):
        if start < stop:
            rows = dropped[start:stop] - files.starts[number]
            names = [keys[row] for row in kept[start:stop].tolist()]
            yield files.paths[number], pa.table({"row": rows.astype(np.int32), "kept": names})


def _keys(files: Files, ids: Ids) -> dict[int, str]:
    found: dict[int, str] = {}
    bounds = np.searchsorted(ids, files.starts)
    for number, (start, stop) in enumerate(pairwise(bounds.tolist())):
        if start < stop:
            with files.folder.open(files.paths[number]) as file:
                table = pq.read_table(file, columns=["row", "key"])
            key = dict(zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True))
            found |= {row: key[row - files.starts[number]] for row in ids[start:stop].tolist()}
    return found
