"""Chain: lists of URLs -> web shards in img2dataset's layout.

read -> fetch -> write, all in the actor that has the unit; a unit is a shard.
"""

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, PositiveInt

from pipelines.schedule import PrepareReport, Workers, run_tasks, run_units
from pipelines.shards import Unit
from pipelines.stages.fetch import FetchSettings, fetch
from pipelines.stages.write_shard import Pictures, WriteShard
from pipelines.url_list import Columns, Pieces, cut_list, kept_name, list_files
from udiff.data.manifest import INDEX, Plan, UnitEntry, start_plan
from udiff.data.storage import Folder, open_folder
from udiff.settings import Settings

_SHARD_DIGITS = 5  # at least, as in img2dataset; more where names would not sort else


class DownloadSettings(Settings):
    """What is downloaded, and how."""

    input: str
    """A list of URLs, or a folder of lists; path or bucket URI."""
    output: str
    columns: Columns = Columns()
    shard_rows: int = Field(default=10_000, gt=1)
    """URLs of a shard; in flight, and fetched again when a job is killed."""
    fetch: FetchSettings = FetchSettings()
    workers: PositiveInt | None = None
    """Processes; as many as the cluster has CPUs where it is left open."""


class DownloadChain:
    """All stages from the URLs of a shard to its commit."""

    def __init__(self, settings: DownloadSettings, index: Folder, write: WriteShard) -> None:
        self._settings = settings
        self._index = index
        self._write = write

    def __call__(self, unit: Unit) -> UnitEntry:
        """Fetch a shard and commit it."""
        rows = read_rows(self._index, unit)
        urls = [url or "" for url in rows["url"].to_pylist()]
        with (
            tempfile.TemporaryDirectory(prefix="udiff-") as name,
            Path(name, "pictures").open("w+b") as file,
        ):
            pictures = Pictures(file, self._hashes(rows))
            refusals = fetch(urls, pictures.take, self._settings.fetch)
            return self._write(
                unit, rows, pictures=pictures, refusals=refusals, temporary=Path(name)
            )

    def _hashes(self, rows: pa.Table) -> list[str | None]:
        column = self._settings.columns.sha256
        return rows[kept_name(column)].to_pylist() if column else [None] * len(rows)


def read_rows(index: Folder, unit: Unit) -> pa.Table:
    """Read the rows of a unit.

    Raises:
        ValueError: they are not as many as the unit says.
    """
    with index.open(unit.source) as file:
        rows = pq.read_table(file)
    if len(rows) != unit.num_samples:
        raise ValueError(f"{index}/{unit.source} holds {len(rows)} rows, not {unit.num_samples}")
    return rows


def plan_download(settings: DownloadSettings) -> Plan:
    """Check the input, and begin a download or go on with the one begun; needs no Ray.

    Raises:
        FileNotFoundError: no list at `input`.
        ValueError: there is another download, or a cache, at `output`.
    """
    _, files = list_files(settings.input)
    plan = Plan(
        kind="shards",
        identity={"shards": _identity(settings)},
        options={"shard_rows": settings.shard_rows},
        inputs={**files},
        shapes={},
    )
    start_plan(open_folder(settings.output), plan)
    return plan


def make_shards(settings: DownloadSettings, plan: Plan) -> PrepareReport:
    """Download all shards of a plan that are not there yet, on the running Ray.

    Raises:
        ValueError: a list that cannot be read, too many workers, or nothing that could be fetched.
        FailedUnitsError: some shards could not be made.
    """
    folder, _ = list_files(settings.input)
    output = open_folder(settings.output)
    arguments = [(folder, output, *file, settings) for file in plan.inputs.items()]
    cuts = run_tasks(_cut, arguments)
    write = WriteShard(output, plan=plan.fingerprint, key_digits=_row_digits(settings.shard_rows))
    return run_units(
        partial(DownloadChain, settings, output / INDEX, write),
        _units(dict(zip(plan.inputs, cuts, strict=True))),
        folder=output,
        plan=plan,
        stage="download",
        workers=Workers(settings.workers),
    )


def _cut(
    folder: Folder, output: Folder, name: str, fingerprint: str, settings: DownloadSettings
) -> Pieces:
    how: Any = {"columns": settings.columns, "shard_rows": settings.shard_rows}
    return cut_list(folder, output, name, fingerprint, **how)


def _units(cuts: dict[str, Pieces]) -> list[Unit]:
    pieces = [
        piece for file, cut in cuts.items() for piece in zip(cut.names(file), cut.rows, strict=True)
    ]
    digits = max(_SHARD_DIGITS, len(str(len(pieces) - 1)))
    return [
        Unit(name=f"{number:0{digits}d}", source=name, num_samples=rows)
        for number, (name, rows) in enumerate(pieces)
    ]


def _identity(settings: DownloadSettings) -> dict[str, Any]:
    """Name what decides which pictures are taken; how patiently they are asked for may change."""
    fetched = {"max_bytes", "user_agent", "agent_name", "opt_outs", "allowed_networks"}
    return {
        "columns": settings.columns.model_dump(mode="json"),
        **settings.fetch.model_dump(mode="json", include=fetched),
    }


def _row_digits(shard_rows: int) -> int:
    """Digits of a row's number in its key: img2dataset's rule."""
    return math.ceil(math.log10(shard_rows))
