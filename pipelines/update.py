"""Carrying a cache over to another input: units whose rows are the same stay as they are."""

import hashlib
import json
from collections.abc import Callable, Collection
from typing import Any

from pipelines.picture_files import INPUT, PictureFiles, hash_file
from pipelines.rows import Refusal, Row, Stage
from pipelines.schedule import run_tasks
from pipelines.shards import Unit
from pipelines.source import Source
from udiff.data.manifest import (
    ENTRIES,
    MANIFEST,
    PLAN,
    REJECTED,
    Plan,
    UnitEntry,
    has_plan,
    read_entries,
    to_json,
    write_entry,
)
from udiff.data.storage import Folder


class Fingerprinted:
    """Stage: takes rows from a source, and hashes all that decides what becomes of them.

    Reads, writes, refuses: as the `take` of the source.
    """

    def __init__(self, take: Stage) -> None:
        self._take = take
        self._digest = hashlib.sha256()

    def __call__(self, row: Row) -> Row:
        """Take a row; a refusal is hashed, too."""
        try:
            taken = self._take(row)
        except Refusal as refusal:
            refused = (row["key"], row["source"], str(refusal.reason), refusal.detail)
            self._update(refused)
            raise
        for name in sorted(taken):
            self._update((name, taken[name]))
        return taken

    def hexdigest(self) -> str:
        """Give the hash of all rows so far."""
        return self._digest.hexdigest()

    def _update(self, values: tuple[Any, ...]) -> None:
        for value in values:
            content = value if isinstance(value, bytes) else json.dumps(value, default=str).encode()
            self._digest.update(f"{type(value).__name__} {len(content)} ".encode())
            self._digest.update(content)


def hash_unit(source: Source, unit: Unit) -> str:
    """Hash the rows of a unit, as its chain does while it makes it."""
    take = Fingerprinted(source.take)
    for row in source.read(unit):
        try:
            take(row)
        except Refusal:
            continue
    return take.hexdigest()


def find_kept(
    folder: Folder,
    plan: Plan,
    units: dict[str, list[Unit]],
    hash_units: Callable[[list[Unit]], list[str]],
) -> set[str]:
    """Find the units whose rows are what they were.

    Args:
        folder: of the cache, whose plan is still the earlier one.
        plan: of the cache that is wanted; it differs in its inputs alone.
        units: wanted, by input file.
        hash_units: reads units and hashes their rows; asked where a file has changed.
    """
    earlier = Plan.model_validate_json(folder.read(PLAN))
    entries = {entry.unit: entry for entry in read_entries(folder)}
    kept, asked = set(), []
    for file, found in units.items():
        same = earlier.inputs.get(file) == plan.inputs[file]
        for unit in found:
            entry = entries.get(unit.name)
            if entry is None or entry.images_in != unit.num_samples:
                continue
            if same and entry.plan == earlier.fingerprint:
                kept.add(unit.name)
            else:
                asked.append(unit)
    for unit, content in zip(asked, hash_units(asked), strict=True):
        if entries[unit.name].content == content:
            kept.add(unit.name)
    return kept


def carry_over(folder: Folder, plan: Plan, kept: Collection[str]) -> None:
    """Put the kept units under a new plan, and take all others out.

    It may be killed at any moment: the new plan is written last, and until then it is done again.
    """
    folder.remove(MANIFEST)
    for entry in read_entries(folder):
        if entry.unit in kept:
            write_entry(folder, entry.model_copy(update={"plan": plan.fingerprint}))
        else:
            _remove(folder, entry)
    folder.write(PLAN, to_json(plan))


def carry_over_files(folder: Folder, plan: Plan, pictures: PictureFiles) -> None:
    """Carry a cache over to other pictures, unless it was begun with these; on the running Ray."""

    def hash_units(units: list[Unit]) -> list[str]:
        return run_tasks(hash_file, [(pictures.folder, unit) for unit in units])

    if not has_plan(folder, plan):
        kept = find_kept(folder, plan, {INPUT: pictures.units()}, hash_units)
        carry_over(folder, plan, kept)


def _remove(folder: Folder, entry: UnitEntry) -> None:
    (folder / ENTRIES).remove(f"{entry.unit}.json")  # first: what has no entry does not exist
    for file in entry.files:
        folder.remove(file.path)
        if file.texts is not None:
            folder.remove(file.texts.path)
    (folder / REJECTED).remove(f"{entry.unit}.parquet")
