"""The order of training samples: a pure function of (seed, epoch, position).

An epoch shuffles its row groups, and then the rows inside windows of a few row groups; the result
is cut into lanes, which a batch draws from in turn. So a batch mixes rows of distant places, a rank
reads a few lanes instead of everything, any position is found without replaying those before it,
and nothing depends on the number of ranks.
"""

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
