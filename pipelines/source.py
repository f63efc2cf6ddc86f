"""What pictures can be read from: a source gives units of work, and the rows of each."""

from collections.abc import Iterator
from typing import Protocol

from pipelines.rows import Row
from pipelines.shards import Unit
from pipelines.sources.tars import Tars
from udiff.data.storage import Folder, open_folder


class Source(Protocol):
    """Pictures with captions and labels; small enough to be sent to every actor."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels that the source itself gives; () where it gives none."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """Per file of the input, in order, what tells its content from another's.

        Raises:
            FileNotFoundError: there is no input, or an incomplete one.
        """
        ...

    def cut(self, output: Folder, name: str, fingerprint: str, num_rows: int) -> list[Unit]:
        """Cut a file of the input into units of about `num_rows` rows; called in a Ray task.

        What it takes a pass over the file to know is kept in the output's index.

        Raises:
            ValueError: the file is damaged.
        """
        ...

    def read(self, unit: Unit) -> Iterator[Row]:
        """Give the rows of a unit, each with key, source and whatever `take` needs."""
        ...

    def take(self, row: Row) -> Row:
        """Stage.

        Writes: file (bytes of the picture); caption ("" for none); label as it is written, or None;
        metadata (mapping of what else is known of it), where there is any.
        Refuses: a missing or empty picture, text that cannot be read.
        """
        ...


def open_source(location: str) -> Source:
    """Open what is at a path or bucket URI."""
    return Tars(open_folder(location))
