"""Batches of several parts, each read from a stream of its own: `image.caption`, `text.caption`."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, closing

import numpy as np
from torch import Tensor

from udiff.data.stream import Stream
from udiff.system import PART_SEPARATOR


class JoinedStream:
    """Streams side by side: every batch has as many rows of each, in orders of their own."""

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self._streams = streams

    def batches(
        self, first_step: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> Generator[dict[str, Tensor], None, None]:
        """Yield this rank's rows of every part of every global batch, as `Stream` does."""
        with ExitStack() as stack:
            parts = {
                name: stack.enter_context(
                    closing(
                        stream.batches(
                            first_step,
                            batch_size=batch_size,
                            seed=_part_seed(seed, number),
                            rank=rank,
                            world_size=world_size,
                        )
                    )
                )
                for number, (name, stream) in enumerate(self._streams.items())
            }
            while True:
                yield {
                    f"{name}{PART_SEPARATOR}{column}": values
                    for name, batches in parts.items()
                    for column, values in next(batches).items()
                }


def split_columns(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group columns `<part>.<column>` by their part."""
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        part, _, column = name.partition(PART_SEPARATOR)
        found[part] = (*found.get(part, ()), column)
    return found


def _part_seed(seed: int, number: int) -> int:
    # Parts of one cache must not come in the same order: that would pair their rows.
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
