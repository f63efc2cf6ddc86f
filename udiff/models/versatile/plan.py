"""The order in which a U-Net's data and context blocks run: one for all diffusers of a network."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["stem", "residual", "down", "up", "head", "context", "push", "pop"]


class Level(NamedTuple):
    """One resolution of the U."""

    channels: int
    num_blocks: int
    """On the way down; there is one more on the way up."""
    has_context: bool


class Step(NamedTuple):
    """One block, or what is done with the features in between."""

    kind: Kind
    channels_in: int
    channels_out: int


@dataclass(frozen=True)
class Plan:
    """The levels of a U, finest first."""

    channels: int
    """Of the first block; time has four times as many."""
    levels: tuple[Level, ...]

    @property
    def time_dim(self) -> int:
        """Width of the time's embedding."""
        return 4 * self.channels

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in order; `push` keeps the features, `pop` appends those kept last."""
        return tuple(self._walk())

    def _walk(self) -> Iterator[Step]:
        kept: list[int] = []
        yield Step("stem", 0, self.channels)
        yield from _push(kept, self.channels)
        width = self.channels
        for number, level in enumerate(self.levels):
            for _ in range(level.num_blocks):
                yield from _block(width, level.channels, level.has_context)
                width = level.channels
                yield from _push(kept, width)
            if number < len(self.levels) - 1:
                yield Step("down", width, width)
                yield from _push(kept, width)
        yield from _block(width, width, True)
        yield Step("residual", width, width)
        for number, level in reversed(list(enumerate(self.levels))):
            for _ in range(level.num_blocks + 1):
                skipped = kept.pop()
                yield Step("pop", width, width + skipped)
                yield from _block(width + skipped, level.channels, level.has_context)
                width = level.channels
            if number:
                yield Step("up", width, width)
        yield Step("head", width, 0)


def _block(channels_in: int, channels_out: int, has_context: bool) -> Iterator[Step]:
    yield Step("residual", channels_in, channels_out)
    if has_context:
        yield Step("context", channels_out, channels_out)


def _push(kept: list[int], width: int) -> Iterator[Step]:
    kept.append(width)
    yield Step("push", width, width)
