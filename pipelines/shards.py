"""The shards of a folder, and the units into which their samples are cut.

A shard is a webdataset tar in img2dataset's layout: `00000.tar`, complete once `00000_stats.json`
is there (img2dataset writes it last; the tar has its final name from the start).
"""

import hashlib
import io
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from pipelines.tar import samples, walk
from udiff.data.manifest import INDEX, to_json
from udiff.data.storage import Folder
from udiff.settings import Settings

_READ_AHEAD_BYTES = 1 << 20  # headers lie close together; on a bucket each read is a request
_FINGERPRINT_BYTES = 1 << 18


@dataclass(frozen=True)
class Unit:
    """One piece of work: consecutive samples of a shard, or one file of a cache."""

    name: str
    source: str
    """Shard or file, relative to the input."""
    num_samples: int
    start: int = 0
    """Bytes of the shard to read."""
    stop: int = 0


class ShardIndex(Settings):
    """Where the samples of a shard start."""

    shard: str
    fingerprint: str
    starts: tuple[int, ...]
    """Offset of each sample's first header."""
    stop: int
    """End of the last sample."""

    def units(self, num_rows: int) -> list[Unit]:
        """Cut the shard into units of `num_rows` samples; the last may have less."""
        bounds = [*self.starts[::num_rows], self.stop]
        return [
            Unit(
                name=f"{_stem(self.shard)}-{number:05d}",
                source=self.shard,
                num_samples=min(num_rows, len(self.starts) - number * num_rows),
                start=start,
                stop=stop,
            )
            for number, (start, stop) in enumerate(pairwise(bounds))
        ]


def list_shards(folder: Folder) -> list[str]:
    """List the tars of a folder in order.

    Raises:
        FileNotFoundError: no such folder, no tar in it, or one that is not complete.
    """
    if not folder.exists():
        raise FileNotFoundError(f"there is no input folder {folder}")
    names = folder.names()
    shards = [name for name in names if name.endswith(".tar")]
    if not shards:
        raise FileNotFoundError(f"{folder} holds no shards (*.tar)")
    for shard in shards:
        if (stats := _stats_name(shard)) not in names:
            raise FileNotFoundError(
                f"shard {folder}/{shard} is not complete: {stats} is missing, which its download "
                "writes last; finish the download or remove the shard"
            )
    return shards


def fingerprint(folder: Folder, shard: str) -> str:
    """Tell a shard from another of its name by its size, its statistics and its first bytes."""
    digest = hashlib.sha256(folder.read(_stats_name(shard)))
    return _add_content(digest, folder, shard)


def fingerprint_file(folder: Folder, name: str) -> str:
    """Tell a file from another of its name by its size and its first bytes."""
    return _add_content(hashlib.sha256(), folder, name)


def _add_content(digest: "hashlib._Hash", folder: Folder, name: str) -> str:
    with folder.open(name) as file:
        digest.update(str(file.size()).encode())
        digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()


def read_index(folder: Folder, output: Folder, shard: str, fingerprint: str) -> ShardIndex:
    """Walk a shard once and keep its index next to the manifest, or read the one kept there.

    Raises:
        ValueError: the shard is damaged or cut off.
    """
    kept, name = output / INDEX, f"{_stem(shard)}.json"
    if kept.exists(name):
        index = ShardIndex.model_validate_json(kept.read(name))
        if index.fingerprint == fingerprint:
            return index
    starts, stop = _sample_bounds(folder, shard)
    index = ShardIndex(shard=shard, fingerprint=fingerprint, starts=starts, stop=stop)
    kept.write(name, to_json(index))
    return index


def _sample_bounds(folder: Folder, shard: str) -> tuple[tuple[int, ...], int]:
    starts, stop = [], 0
    with folder.open(shard) as file:
        stream = io.BufferedReader(cast(io.RawIOBase, file), _READ_AHEAD_BYTES)
        try:
            for sample in samples(walk(stream)):
                starts.append(sample.start)
                stop = sample.stop
        except ValueError as error:
            raise ValueError(f"shard {folder}/{shard}: {error}") from error
    return tuple(starts), stop


def _stem(shard: str) -> str:
    return shard.removesuffix(".tar")


def _stats_name(shard: str) -> str:
    return f"{_stem(shard)}_stats.json"
