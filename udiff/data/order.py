"""The order of training samples: a pure function of (seed, epoch, position).

An epoch shuffles its row groups, and then the rows inside windows of a few row groups; the result
is cut into lanes, which a batch draws from in turn. So a batch mixes rows of distant places, a rank
reads a few lanes instead of everything, any position is found without replaying those before it,
and nothing depends on the number of ranks.

A cache of several sizes has such an order for each bucket, and a plan of the buckets: every batch
is of one bucket.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

Array = np.ndarray


class Place(NamedTuple):
    """Where the samples of some positions are found: in which window, at which of its rows."""

    epoch: Int64[Array, " rows"]
    window: Int64[Array, " rows"]
    row: Int64[Array, " rows"]


class BatchPlace(NamedTuple):
    """Where the rows of a batch are: in which bucket, from which position of its order on."""

    bucket: int
    start: int


class BatchPlan:
    """Which bucket the batch of each step is of; a pure function of (seed, step).

    Each bucket's rows come in one endless sequence, pass after pass, which is cut into batches. An
    epoch holds, in random order, the batches that begin in each bucket's pass of its number. So no
    row is left out and none comes twice in a pass: a batch that the rest of a pass does not fill
    goes on with the bucket's next pass, which then begins behind it. At the end of epoch e each row
    has been used e times, but for less than a batch of each bucket, which have been once more.
    """

    def __init__(self, num_rows: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._num_rows = np.asarray(num_rows, np.int64)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def batch(self, step: int) -> BatchPlace:
        """Find the batch of a step."""
        epoch = self.epoch(step)
        first = self._first_batches(epoch)
        bucket, number = (each[step - int(first.sum())] for each in self._epoch(epoch))
        return BatchPlace(int(bucket), int(first[bucket] + number) * self._batch_size)

    def epoch(self, step: int) -> int:
        """Count the epochs before a step."""
        # Batches are rounded up in each bucket, so epochs end somewhat later than rows would have.
        epoch = step * self._batch_size // int(self._num_rows.sum())
        while self._first_batches(epoch).sum() > step:
            epoch -= 1
        return epoch

    def _first_batches(self, epoch: int) -> Int64[Array, " buckets"]:
        """Count the batches of each bucket before an epoch."""
        return -(-epoch * self._num_rows // self._batch_size)

    def _shuffle(self, epoch: int) -> tuple[Int64[Array, " batches"], Int64[Array, " batches"]]:
        """Give each batch of an epoch its bucket, and its number among those of the bucket."""
        counts = self._first_batches(epoch + 1) - self._first_batches(epoch)
        buckets = np.repeat(np.arange(len(counts)), counts)
        buckets = np.random.default_rng([self._seed, epoch]).permutation(buckets)
        numbers = np.empty_like(buckets)
        for bucket, count in enumerate(counts):
            numbers[buckets == bucket] = np.arange(count)
        return buckets, numbers


class SampleOrder:
    """Order of a cache's rows over any number of epochs; every row comes once an epoch."""

    def __init__(
        self, row_group_sizes: tuple[int, ...], *, seed: int, window_row_groups: int, lanes: int
    ) -> None:
        self._sizes = np.asarray(row_group_sizes, np.int64)
        self._seed = seed
        self._window = window_row_groups
        self._lanes = lanes
        self.num_rows = int(self._sizes.sum())
        self.row_groups = lru_cache(maxsize=4)(self._row_groups)

    def places(self, positions: Int64[Array, " rows"]) -> Place:
        """Find the samples at positions counted over all epochs."""
        epochs, inside = np.divmod(positions, self.num_rows)
        lane, offset = inside % self._lanes, inside // self._lanes
        # The first num_rows % lanes lanes are one row longer.
        short, longer = divmod(self.num_rows, self._lanes)
        row = lane * short + np.minimum(lane, longer) + offset
        window = np.empty_like(row)
        index = np.empty_like(row)
        for epoch in np.unique(epochs):
            ends = self._window_ends(int(epoch))
            mine = epochs == epoch
            window[mine] = np.searchsorted(ends, row[mine], side="right")
            starts = np.concatenate([[0], ends[:-1]])
            index[mine] = row[mine] - starts[window[mine]]
        return Place(epochs, window, index)

    def window_row_groups(self, epoch: int, window: int) -> Int64[Array, " row_groups"]:
        """List the row groups that a window reads."""
        return self.row_groups(epoch)[window * self._window : (window + 1) * self._window]

    def window_permutation(self, epoch: int, window: int) -> Int64[Array, " rows"]:
        """Shuffle a window: which row of its row groups, end to end, comes at each index."""
        rows = int(self._sizes[self.window_row_groups(epoch, window)].sum())
        return self._generator(epoch, window + 1).permutation(rows)

    def _row_groups(self, epoch: int) -> Int64[Array, " row_groups"]:
        return self._generator(epoch, 0).permutation(len(self._sizes))

    def _window_ends(self, epoch: int) -> Int64[Array, " windows"]:
        ends = np.cumsum(self._sizes[self.row_groups(epoch)])
        last_of_window = np.arange(self._window - 1, len(ends), self._window)
        return ends[np.unique(np.append(last_of_window, len(ends) - 1))]

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self._seed, epoch, stream]))
