"""What a cache holds and what made it: `manifest.json`, folded from one small entry per unit.

A unit's entry is written after its files and is its commit; what has no entry does not exist. The
plan, written first, says which units are wanted and from what, so that a job which is started again
continues only its own cache. All of it is a function of the input: two runs write equal bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, JsonValue, ValidationError

from udiff.data.storage import Folder, open_folder
from udiff.settings import Settings

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
ENTRIES = "units"
DATA = "data"
TEXTS = "texts"
REJECTED = "rejected"
INDEX = "index"
_REQUESTS = 16  # to a bucket, at a time

Kind = Literal["shards", "pictures", "signatures", "latents"]
Identity = dict[str, dict[str, JsonValue]]
"""Per column, what made it."""


class ParquetFile(Settings):
    """A parquet file of a cache."""

    path: str
    """Relative to the cache."""
    rows: int
    row_groups: tuple[int, ...]
    """Rows of each row group."""


class CacheFile(ParquetFile):
    """A file of rows, and the encoded texts that its rows refer to."""

    bucket: str = ""
    """Of which its pictures are, in a cache of several sizes."""
    texts: ParquetFile | None = None
    """Where it has columns of encoded texts."""


class LatentSums(Settings):
    """Sums over the elements of each channel, from which the statistics of any union follow."""

    count: int
    """Elements per channel."""
    mean: tuple[float, ...]
    mean_squared: tuple[float, ...]
    variance: tuple[float, ...]


class LatentStatistics(Settings):
    """Per-channel mean and standard deviation of *sampled* raw latents."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class UnitEntry(Settings):
    """What one unit wrote; its presence is the unit's commit."""

    unit: str
    plan: str
    """Fingerprint of the plan it was made under."""
    images_in: int
    files: tuple[CacheFile, ...]
    """None where every row was rejected."""
    rejected: dict[str, int]
    latent_sums: LatentSums | None = None
    content: str = ""
    """Hash of the rows that it was made from, where a changed input can be told by it."""


class Plan(Settings):
    """Everything that decides the bytes of a cache."""

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    identity: Identity
    options: dict[str, JsonValue]
    """What shapes the files but not the columns, such as rows per unit."""
    inputs: dict[str, JsonValue]
    """Per shard or file read, what tells its content from another's."""
    shapes: dict[str, tuple[int, ...]]
    buckets: dict[str, dict[str, tuple[int, ...]]] = Field(default_factory=dict)
    """Per bucket, the shapes of the columns that have another in each; a cache without buckets has
    one shape of each column."""
    class_names: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of the whole plan."""
        return hashlib.sha256(to_json(self)).hexdigest()


class Manifest(Settings):
    """A finished cache."""

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    identity: Identity
    files: tuple[CacheFile, ...]
    shapes: dict[str, tuple[int, ...]]
    """Of one row of each tensor or picture column; of encoded texts, that of the longest."""
    buckets: dict[str, dict[str, tuple[int, ...]]] = Field(default_factory=dict)
    """Per bucket, the shapes of the columns that have another in each."""
    images_in: int
    rejected: dict[str, int]
    """Rows left out, per `stage/reason`."""
    class_names: tuple[str, ...] = ()
    latent_statistics: LatentStatistics | None = None

    @property
    def num_rows(self) -> int:
        """Rows in all files."""
        return sum(file.rows for file in self.files)

    def all_shapes(self, column: str) -> set[tuple[int, ...]]:
        """Collect the shapes that a column has in any bucket; none where it is not there."""
        found = (shapes.get(column) for shapes in (self.shapes, *self.buckets.values()))
        return {shape for shape in found if shape is not None}


def to_json(record: Settings) -> bytes:
    """Serialize a record; equal records give equal bytes."""
    return (json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


# ---------------------------------------------------------------- reading


def read_manifest(root: str | Path | Folder) -> Manifest:
    """Read the manifest of a finished cache.

    Raises:
        FileNotFoundError: no such folder, or no finished cache in it.
        ValueError: the manifest is of another schema version, or damaged.
    """
    folder = root if isinstance(root, Folder) else open_folder(root)
    if not folder.exists(MANIFEST):
        raise FileNotFoundError(_missing(folder))
    data = json.loads(folder.read(MANIFEST))
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{folder}/{MANIFEST} has schema version {version}, this udiff reads {SCHEMA_VERSION}: "
            "make the cache again with `python -m jobs.prepare`"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{folder}/{MANIFEST} is damaged: {error}") from error


def _missing(folder: Folder) -> str:
    command = "`python -m jobs.prepare pictures` or `python -m jobs.prepare latents`"
    if not folder.exists():
        return f"there is no cache at {folder}: make it with {command}"
    if folder.exists(PLAN):
        return f"the cache at {folder} is not finished: run the same {command} again"
    return f"{folder} holds no {MANIFEST}, so it is no cache: make one with {command}"


# ---------------------------------------------------------------- identity


def identity_difference(
    wanted: Mapping[str, Any], found: Mapping[str, Any], *, prefix: str = ""
) -> list[str]:
    """Name each key, dotted, in which two nested mappings differ, with both values."""
    differences = []
    for key in sorted({*wanted, *found}):
        one, other = wanted.get(key), found.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            differences += identity_difference(one, other, prefix=f"{prefix}{key}.")
        elif one != other:
            differences.append(f"{prefix}{key} is {_brief(other)}, wanted {_brief(one)}")
    return differences


def check_identity(manifest: Manifest, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a cache of which a column in `wanted` was made by something else.

    Only the keys that are wanted of a column are compared.

    Raises:
        ValueError: naming each key that differs, with both values.
    """
    found = {}
    for column, keys in wanted.items():
        made_by = manifest.identity.get(column, {})
        found[column] = {key: made_by[key] for key in keys if key in made_by}
    if differences := identity_difference(wanted, found):
        raise ValueError(f"the cache was made by something else: {'; '.join(differences)}")


def _brief(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------- writing


def start_plan(folder: Folder, plan: Plan, *, update: bool = False) -> None:
    """Write the plan of a new cache, or check that what is committed here has the same.

    With `update` the inputs may differ; the plan that is here then stays.

    Raises:
        ValueError: the folder holds (a part of) another cache; names what differs.
    """
    if not folder.exists(PLAN) and (folder.exists(MANIFEST) or committed_units(folder)):
        raise ValueError(f"{folder} holds a cache without its {PLAN}: choose another --output")
    if not committed_units(folder):
        folder.write(PLAN, to_json(plan))
        return
    found, wanted = json.loads(folder.read(PLAN)), plan.model_dump(mode="json")
    if update:
        found = {**found, "inputs": wanted["inputs"]}
    if differences := identity_difference(wanted, found):
        raise ValueError(
            f"{folder} holds another cache: {'; '.join(differences[:8])}; "
            "delete it or choose another --output"
        )


def write_entry(folder: Folder, entry: UnitEntry) -> None:
    """Commit a unit whose files are written."""
    (folder / ENTRIES).write(f"{entry.unit}.json", to_json(entry))


def is_committed(folder: Folder, unit: str) -> bool:
    """Tell whether a unit is done."""
    return (folder / ENTRIES).exists(f"{unit}.json")


def committed_units(folder: Folder) -> frozenset[str]:
    """List the units that are done: one listing of the folder."""
    return frozenset(name.removesuffix(".json") for name in (folder / ENTRIES).names())


def read_entries(folder: Folder) -> list[UnitEntry]:
    """Read the entries of all units that are done, under whatever plan."""

    def read(unit: str) -> UnitEntry:
        return UnitEntry.model_validate_json((folder / ENTRIES).read(f"{unit}.json"))

    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(read, sorted(committed_units(folder))))


def has_plan(folder: Folder, plan: Plan) -> bool:
    """Tell whether the cache here was begun under this very plan."""
    return folder.read(PLAN) == to_json(plan)


def finish(folder: Folder, plan: Plan, units: Sequence[str]) -> Manifest:
    """Fold the entries of all units, in their order, into the manifest, and write it.

    Raises:
        ValueError: an entry was made under another plan, or nothing at all was cached.
    """
    with ThreadPoolExecutor(_REQUESTS) as pool:
        entries = list(pool.map(partial(_read_entry, folder, plan.fingerprint), units))
    rejected: Counter[str] = Counter()
    for entry in entries:
        rejected.update(entry.rejected)
    manifest = Manifest(
        kind=plan.kind,
        identity=plan.identity,
        files=tuple(file for entry in entries for file in entry.files),
        shapes=plan.shapes,
        buckets=plan.buckets,
        images_in=sum(entry.images_in for entry in entries),
        rejected=dict(sorted(rejected.items())),
        class_names=plan.class_names,
        latent_statistics=latent_statistics(
            entry.latent_sums for entry in entries if entry.latent_sums is not None
        ),
    )
    if not manifest.files:
        raise ValueError(
            f"all {manifest.images_in} pictures were rejected: {manifest.rejected}; "
            f"see {folder / REJECTED}, then delete {folder}"
        )
    folder.write(MANIFEST, to_json(manifest))
    for part in (folder, *(folder / name for name in (DATA, TEXTS, REJECTED, INDEX, ENTRIES))):
        part.remove_temporaries()
    return manifest


def _read_entry(folder: Folder, plan: str, unit: str) -> UnitEntry:
    entry = UnitEntry.model_validate_json((folder / ENTRIES).read(f"{unit}.json"))
    if entry.plan != plan:
        raise ValueError(
            f"{folder}/{ENTRIES}/{unit}.json was made under another plan ({entry.plan[:12]}, "
            f"wanted {plan[:12]}): delete the cache or choose another --output"
        )
    return entry


# ---------------------------------------------------------------- statistics


def latent_sums(mean: np.ndarray, logvar: np.ndarray) -> LatentSums:
    """Sum posterior means and log variances (rows, channels, ...) per channel, in float64."""
    channels = mean.shape[1]
    means = np.moveaxis(mean.astype(np.float64), 1, 0).reshape(channels, -1)
    variances = np.exp(np.moveaxis(logvar.astype(np.float64), 1, 0).reshape(channels, -1))
    return LatentSums(
        count=means.shape[1],
        mean=tuple(means.sum(axis=1).tolist()),
        mean_squared=tuple(np.square(means).sum(axis=1).tolist()),
        variance=tuple(variances.sum(axis=1).tolist()),
    )


def latent_statistics(sums: Iterable[LatentSums]) -> LatentStatistics | None:
    """Give mean and std of latents drawn from the posteriors; None where there are none.

    The mean is the mean of the means, the variance (law of total variance) the variance of the
    means plus the mean of the variances.
    """
    parts = list(sums)
    if not parts:
        return None
    count = sum(part.count for part in parts)
    mean = np.sum([part.mean for part in parts], axis=0) / count
    spread = np.sum([part.mean_squared for part in parts], axis=0) / count - np.square(mean)
    variance = spread + np.sum([part.variance for part in parts], axis=0) / count
    return LatentStatistics(mean=tuple(mean.tolist()), std=tuple(np.sqrt(variance).tolist()))
