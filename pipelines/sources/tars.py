"""Source: web shards, webdataset tars in img2dataset's layout."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from pipelines.rows import Row
from pipelines.shards import Unit, fingerprint, list_shards, read_index
from pipelines.stages.read_shard import read_slice, take_fields
from udiff.data.storage import Folder

_REQUESTS = 16  # to a bucket, at a time


@dataclass(frozen=True)
class Tars:
    """The tars of a folder; a unit is a slice of one, found by an index that is made once."""

    folder: Folder
    class_names: tuple[str, ...] = ()

    def fingerprints(self) -> dict[str, str]:
        """Tell each shard from another of its name."""
        shards = list_shards(self.folder)
        with ThreadPoolExecutor(_REQUESTS) as pool:
            found = pool.map(partial(fingerprint, self.folder), shards)
            return dict(zip(shards, found, strict=True))

    def cut(self, output: Folder, name: str, fingerprint: str, num_rows: int) -> list[Unit]:
        """Cut a shard into units, by its index."""
        return read_index(self.folder, output, name, fingerprint).units(num_rows)

    def read(self, unit: Unit) -> Iterator[Row]:
        """Read a unit with one seek and one read."""
        return read_slice(self.folder, unit)

    def take(self, row: Row) -> Row:
        """Take picture, caption and label from a sample's members."""
        return take_fields(row)
