"""The files of a finished pictures cache, as the units of the chain that comes after it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rows import Row
from pipelines.shards import Unit
from udiff.data.manifest import MANIFEST, PLAN, Manifest, read_manifest
from udiff.data.storage import Folder, open_folder

INPUT = "pictures"
"""What a plan calls a pictures cache that it reads."""


@dataclass(frozen=True)
class PictureFiles:
    """A pictures cache; a unit is one of its files."""

    folder: Folder
    manifest: Manifest

    def units(self) -> list[Unit]:
        """List the files, in the cache's order."""
        return [Unit(Path(file.path).stem, file.path, file.rows) for file in self.manifest.files]

    def schema(self) -> pa.Schema:
        """Read the columns from the first file."""
        with self.folder.open(self.manifest.files[0].path) as file:
            return pq.read_schema(file)

    def read(self, unit: Unit) -> list[Row]:
        """Read a file; in a cache of several sizes, rows say which bucket they are of.

        Raises:
            ValueError: the file is damaged, or has not the rows that the manifest says.
        """
        return self.parse(unit, self.load(unit))

    def load(self, unit: Unit) -> bytes:
        """Read the bytes of a file, in one go."""
        return self.folder.read(unit.source)

    def parse(self, unit: Unit, content: bytes) -> list[Row]:
        """Take the rows out of a file's bytes."""
        rows = pq.read_table(pa.BufferReader(content)).to_pylist()
        if len(rows) != unit.num_samples:
            raise ValueError(
                f"{self.folder}/{unit.source} holds {len(rows)} rows, the manifest says "
                f"{unit.num_samples}"
            )
        bucket = self.bucket(unit)
        return [{**row, "bucket": bucket} for row in rows] if bucket else rows

    def bucket(self, unit: Unit) -> str:
        """Name the bucket of a file's pictures; "" where all pictures are of one size."""
        return next(file.bucket for file in self.manifest.files if file.path == unit.source)

    def size(self, bucket: str) -> tuple[int, int]:
        """Give height and width of the pictures of a bucket."""
        shapes = self.manifest.buckets.get(bucket, self.manifest.shapes)
        height, width, _ = shapes["image"]
        return height, width

    def fingerprint(self) -> str:
        """Tell the cache from another."""
        content = self.folder.read(MANIFEST) + self.folder.read(PLAN)
        return hashlib.sha256(content).hexdigest()


def hash_file(folder: Folder, unit: Unit) -> str:
    """Tell the content of a file of a pictures cache from another's."""
    return hashlib.sha256(folder.read(unit.source)).hexdigest()


def open_pictures(location: str) -> PictureFiles:
    """Open a finished pictures cache.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a cache of something else.
    """
    folder = open_folder(location)
    manifest = read_manifest(folder)
    if manifest.kind != "pictures":
        raise ValueError(f"{folder} is a cache of {manifest.kind}, pictures are wanted")
    return PictureFiles(folder, manifest)
