"""Runs a chain over its units with Ray Data.

One actor carries a unit the whole way, and no picture goes through Ray. Or tasks, on any machine
with a CPU, read units ahead for the actors, so that no GPU waits for decoding; Ray Data bounds how
far they are ahead by the object store's memory.

A unit that fails does not stop the others; what is missing at the end is found by comparing the
units wanted with those committed.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.util.annotations import RayDeprecationWarning
from ray.util.metrics import Counter, Gauge
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.rows import cut, stable_text
from pipelines.shards import Unit
from udiff.data.manifest import (
    Manifest,
    Plan,
    UnitEntry,
    committed_units,
    finish,
    is_committed,
)
from udiff.data.storage import Folder

Result = TypeVar("Result")
_Columns: TypeAlias = dict[str, np.ndarray]

_MAX_UNITS = 10_000  # that Ray Data is given at a time: its driver keeps some kilobytes for each
_MAX_RETRIES = 2  # Ray Data's own default is for ever
_READERS_PER_WORKER = 4
_UNLIMITED = -1


class Chain(Protocol):
    """All stages of a cache, in one object that lives in an actor."""

    def __call__(self, unit: Unit) -> UnitEntry:
        """Carry a unit from its source to its commit."""
        ...


class SplitChain(Chain, Protocol):
    """A chain whose first half, which needs nothing that is loaded, can be done elsewhere."""

    def finish(self, unit: Unit, read: Any) -> UnitEntry:
        """Carry a unit from what was read of it to its commit."""
        ...


@dataclass(frozen=True)
class Readers:
    """Tasks that do the first half of a split chain."""

    read: Callable[[Unit], Any]
    """What it returns is pickled."""
    count: int | None
    """At a time, each with a CPU; 0 leaves reading to the workers. None takes the CPUs that workers
    with GPUs leave free, as far as they are of use."""


@dataclass(frozen=True)
class Workers:
    """The actors that run a chain."""

    count: int | None
    """None takes as many as the cluster has room for."""
    cpus: int = 1
    gpus: float = 0


@dataclass(frozen=True)
class PrepareReport:
    """A finished cache, and how fast this run was (the manifest holds nothing that varies)."""

    manifest: Manifest
    units_done: int
    """Units that this run made; the others were there."""
    images_per_s: float
    """From the start of the first unit to the end of the last; 0 where none was left to do."""
    wall_s: float


class FailedUnitsError(RuntimeError):
    """Units are missing after all others were tried; they are tried again by the next run."""


def run_units(
    make_chain: Callable[[], Chain],
    units: Sequence[Unit],
    *,
    folder: Folder,
    plan: Plan,
    stage: str,
    workers: Workers,
    readers: Readers | None = None,
) -> PrepareReport:
    """Run the units that are not committed yet, then fold the manifest.

    With `readers` the chain is a `SplitChain`. Ray's metrics count what it does under `stage`.

    Raises:
        ValueError: the cluster has too few CPUs or GPUs for the workers.
        FailedUnitsError: units wanted and units committed differ; names them and why.
    """
    started = time.perf_counter()
    done = committed_units(folder)
    missing = [unit for unit in units if unit.name not in done]
    arguments = (make_chain, folder, stage)
    outcome = _Tally()
    if missing:
        images = sum(unit.num_samples for unit in missing)
        _follow(_run(arguments, missing, workers, readers), images, outcome)
    if failed := {unit.name for unit in missing} - committed_units(folder):
        raise FailedUnitsError(_describe(failed, outcome.errors, len(units)))
    manifest = finish(folder, plan, [unit.name for unit in units])
    wall_s = time.perf_counter() - started
    return PrepareReport(manifest, len(missing), outcome.images_per_s, wall_s)


def run_tasks(
    function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], *, gpus: float = 0
) -> list[Result]:
    """Call a function with each of the arguments, in a task of its own; results in order."""
    task = ray.remote(max_retries=_MAX_RETRIES, num_gpus=gpus)(function)
    try:
        return ray.get([task.remote(*each) for each in arguments])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


@dataclass(frozen=True)
class _Outcome:
    """What a reader has made of a unit."""

    read: Any = None
    """None where there was no reader, or the unit was committed."""
    error: str = ""


def _read(batch: _Columns, *, read: Callable[[Unit], Any], folder: Folder) -> _Columns:
    """Do the first half of a chain, as a task of Ray Data; reports instead of raising."""
    unit = Unit(**{name: column.tolist()[0] for name, column in batch.items()})
    outcome = np.empty(1, object)
    try:
        outcome[0] = _Outcome(None if is_committed(folder, unit.name) else read(unit))
    except Exception as failure:  # as in the workers
        outcome[0] = _Outcome(error=_explain(failure))
    return {**batch, "outcome": outcome}


def _carry(chain: Chain, unit: Unit, read: Any) -> UnitEntry:
    return chain(unit) if read is None else cast(SplitChain, chain).finish(unit, read)


def _explain(failure: Exception) -> str:
    return f"{type(failure).__name__}: {stable_text(failure)}"


class _Worker:
    """What Ray Data calls: a chain in its actor, which reports instead of raising."""

    def __init__(self, make_chain: Callable[[], Chain], folder: Folder, stage: str) -> None:
        self._make_chain = make_chain
        self._folder = folder
        self._stage = stage
        # Made here: a metric belongs to the process that counts.
        self._rows = Counter("udiff_rows", tag_keys=("stage", "result"))
        self._bytes = Counter("udiff_bytes", tag_keys=("stage",))
        self._speed = Gauge("udiff_images_per_s", tag_keys=("stage",))

    @cached_property
    def _chain(self) -> Chain:
        """Made with the first unit, whose report then says why it could not be made."""
        return self._make_chain()

    def __call__(self, batch: _Columns) -> _Columns:
        row = {name: column.tolist()[0] for name, column in batch.items()}
        outcome = row.pop("outcome", _Outcome())
        unit, started, error = Unit(**row), time.time(), outcome.error
        try:
            chain, started = self._chain, time.time()
            # Workers of a killed job live on for a while, and may have finished it meanwhile.
            if not error and not is_committed(self._folder, unit.name):
                self._count(_carry(chain, unit, outcome.read), time.time() - started)
        except Exception as failure:  # Ray Data would give up all the other units
            error = _explain(failure)
        report = _Report(unit.name, unit.num_samples, started, time.time(), error)
        return {name: np.array([value]) for name, value in asdict(report).items()}

    def _count(self, entry: UnitEntry, seconds: float) -> None:
        cached = sum(file.rows for file in entry.files)
        paths = [file.path for cache in entry.files for file in (cache, cache.texts) if file]
        if written := sum(map(self._folder.size, paths)):
            self._bytes.inc(written, {"stage": self._stage})
        for result, rows in (("cached", cached), ("rejected", entry.images_in - cached)):
            if rows:
                self._rows.inc(rows, {"stage": self._stage, "result": result})
        self._speed.set(entry.images_in / seconds, {"stage": self._stage})


@dataclass(frozen=True)
class _Report:
    unit: str
    images: int
    started: float
    ended: float
    error: str


@dataclass
class _Tally:
    """What became of the units so far: as small for many as for few."""

    images: int = 0
    started: float = math.inf
    ended: float = 0.0
    errors: dict[str, str] = field(default_factory=dict)
    """Of the units that failed."""

    def add(self, report: _Report) -> None:
        """Count one more unit."""
        self.started, self.ended = min(self.started, report.started), max(self.ended, report.ended)
        if report.error:
            self.errors[report.unit] = report.error
        else:
            self.images += report.images

    @property
    def images_per_s(self) -> float:
        """Pictures per second, from the first unit's start; 0 before any."""
        return self.images / max(self.ended - self.started, 1e-9)


def _run(
    arguments: tuple[Any, ...], units: Sequence[Unit], workers: Workers, readers: Readers | None
) -> Iterator[_Report]:
    """Give the reports of all units as they come, in any order."""
    num_actors, num_readers = _pool_sizes(workers, readers, len(units))
    with DataContext.current(_quiet_context()), warnings.catch_warnings():
        # Ray 2.60 means to drop these arguments, and has nothing yet that bounds retries.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        for part in cut(units, _MAX_UNITS):
            data: ray.data.Dataset = ray.data.from_items(
                [asdict(unit) for unit in part], override_num_blocks=len(part)
            )
            if readers is not None and num_readers:
                data = data.map_batches(
                    partial(_read, read=readers.read, folder=arguments[1]),
                    batch_size=1,
                    batch_format="numpy",
                    compute=TaskPoolStrategy(size=num_readers),
                    num_cpus=1,
                    max_retries=_MAX_RETRIES,
                )
            data = data.map_batches(
                _Worker,
                fn_constructor_args=arguments,
                batch_size=1,
                batch_format="numpy",
                # One in flight: a unit that is queued on an actor that dies would be dropped.
                compute=ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=1),
                num_cpus=workers.cpus,
                num_gpus=workers.gpus,
                max_task_retries=_MAX_RETRIES,
                max_restarts=_UNLIMITED,
            )
            for row in data.iter_rows():
                yield _Report(**row)


def _quiet_context() -> DataContext:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.max_errored_blocks = _UNLIMITED
    return context


def _follow(reports: Iterable[_Report], num_images: int, tally: _Tally) -> None:
    """Count the reports of the units as they come, under a bar that counts pictures."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} pictures/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("pictures", total=num_images, speed=0.0)
        for report in reports:
            tally.add(report)
            bar.update(task, advance=report.images, speed=tally.images_per_s)


def _pool_sizes(workers: Workers, readers: Readers | None, num_units: int) -> tuple[int, int]:
    """Give the numbers of actors and readers, for which there must be room at one time.

    Ray Data would wait for room in silence.
    """
    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0), there.get("GPU", 0)
    wanted = (readers and readers.count) or 0
    room = max(0, int((cpus - wanted) // workers.cpus))
    if workers.gpus:
        room = min(room, int(gpus // workers.gpus))
    count = room if workers.count is None else workers.count
    if not 0 < count <= room:
        beside = f" beside {wanted} decoders" if wanted else ""
        raise ValueError(
            f"{count or 1} workers of {workers.cpus} CPU and {workers.gpus:g} GPU each{beside}, "
            f"but the cluster has {cpus:g} CPU and {gpus:g} GPU: lower --workers or --threads"
            f"{' or --decoders' if wanted else ''}"
        )
    count = min(count, num_units)
    if readers is not None and readers.count is None and workers.gpus:
        wanted = min(_READERS_PER_WORKER * count, int(cpus - count * workers.cpus))
    return count, wanted


def _describe(failed: set[str], errors: Mapping[str, str], num_units: int) -> str:
    named = [f"{unit} ({errors.get(unit, 'its process died')})" for unit in sorted(failed)]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    return (
        f"{len(failed)} of {num_units} units failed: {'; '.join(named[:5])}{more}. "
        "The others are kept; run the same command again to retry"
    )
