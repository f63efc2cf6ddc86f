"""Pictures of a cache, or of any source, by their numbers: what evaluations read."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipelines.rows import Row, carry
from pipelines.shards import Unit
from pipelines.source import Source, open_source
from pipelines.stages.decode import decode, identify
from udiff.autoencoders.pixels import to_pixels
from udiff.data.manifest import MANIFEST, read_manifest
from udiff.data.schema import decode_png
from udiff.data.storage import Folder, open_folder
from udiff.evaluation.reconstruction import evaluation_crop

_UNIT_ROWS = 256
_MAX_PIXELS = 89_478_485


class Pictures(Protocol):
    """Squares of one size; small enough to be sent to every task."""

    def units(self) -> Iterator[Unit]:
        """Give the pieces that can be read by themselves, in order."""
        ...

    def read(self, unit: Unit, rows: range) -> Iterator[tuple[int, Tensor]]:
        """Give pixels in [-1, 1], 3 x size x size, with their row in the unit.

        Rows that are no pictures are passed over.
        """
        ...


@dataclass(frozen=True)
class CachedPictures:
    """A pictures cache; a unit is one of its files."""

    folder: Folder

    def units(self) -> Iterator[Unit]:
        """Give the files."""
        manifest = read_manifest(self.folder)
        if manifest.kind != "pictures":
            raise ValueError(f"{self.folder} is a cache of {manifest.kind}, pictures are wanted")
        if manifest.buckets:
            raise ValueError(f"{self.folder} holds pictures of several sizes, one is wanted")
        for file in manifest.files:
            yield Unit(Path(file.path).stem, file.path, file.rows)

    def read(self, unit: Unit, rows: range) -> Iterator[tuple[int, Tensor]]:
        """Decode the rows of a file."""
        with self.folder.open(unit.source) as file:
            column = pq.read_table(file, columns=["image"]).column("image")
        for row in rows:
            picture = torch.from_numpy(decode_png(column[row].as_py()))
            yield row, to_pixels(picture[None])[0]


@dataclass(frozen=True)
class SourcePictures:
    """Web shards, or whatever else can be opened, cropped as published evaluations do."""

    source: Source
    size: int

    def units(self) -> Iterator[Unit]:
        """Cut the input into units, one file after another."""
        with TemporaryDirectory() as name:
            index = open_folder(name)
            for file, fingerprint in self.source.fingerprints().items():
                yield from self.source.cut(index, file, fingerprint, _UNIT_ROWS)

    def read(self, unit: Unit, rows: range) -> Iterator[tuple[int, Tensor]]:
        """Decode and crop rows of a unit."""
        header = partial(identify, max_pixels=_MAX_PIXELS)
        stages = (self.source.take, header, decode, self._crop)
        for number, row in enumerate(islice(self.source.read(unit), rows.stop)):
            if number in rows:
                for kept in carry([row], *stages).kept:
                    yield number, kept["pixels"]

    def _crop(self, row: Row) -> Row:
        picture = torch.from_numpy(np.array(row["picture"]))
        return {**row, "pixels": evaluation_crop(picture, self.size)}


def open_pictures(location: str, *, size: int | None) -> Pictures:
    """Open a pictures cache, or a source whose pictures are cropped to `size`.

    Raises:
        ValueError: it is a source, and there is no size.
    """
    folder = open_folder(location)
    if folder.exists(MANIFEST):
        return CachedPictures(folder)
    if size is None:
        raise ValueError(f"{location} is no pictures cache: --size says what to crop pictures to")
    return SourcePictures(open_source(location), size)


@dataclass(frozen=True)
class Numbered:
    """A unit, and the number of its first picture among all of them."""

    unit: Unit
    first: int

    def rows(self, start: int, stop: int) -> range:
        """Give the rows whose numbers are in [start, stop)."""
        return range(
            max(0, start - self.first), max(0, min(stop - self.first, self.unit.num_samples))
        )


def number_pictures(pictures: Pictures, num_pictures: int | None) -> tuple[list[Numbered], int]:
    """Number the first units that hold so many pictures, or all; gives the number of pictures, too.

    Raises:
        ValueError: there are fewer, or none.
    """
    numbered: list[Numbered] = []
    total = 0
    for unit in pictures.units():
        numbered.append(Numbered(unit, total))
        total += unit.num_samples
        if num_pictures is not None and total >= num_pictures:
            return numbered, num_pictures
    if num_pictures is not None or not total:
        raise ValueError(f"there are {total} pictures, {num_pictures or 'some'} are wanted")
    return numbered, total


def read_numbered(
    pictures: Pictures, numbered: list[Numbered], start: int, stop: int
) -> Iterator[tuple[int, Tensor]]:
    """Give the pictures from number `start` up to `stop`, with their numbers."""
    for each in numbered:
        rows = each.rows(start, stop)
        if rows:
            for row, pixels in pictures.read(each.unit, rows):
                yield each.first + row, pixels
