"""Chains: a pictures cache -> the same without duplicates, in three steps that each commit.

1. Signatures, a unit at a time, in `signatures/` of the output: a cache of its own.
2. The decision, from all signatures, in tasks that each hold a part of them: `duplicates/` names
   the rows to drop. It does not depend on the order of work.
3. The drop, a unit at a time.
"""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field, PositiveInt, model_validator

from pipelines.duplicates import (
    Cosine,
    Equality,
    Files,
    Hamming,
    Pairs,
    Rule,
    drop_lists,
    find_pairs,
    resolve,
)
from pipelines.picture_files import INPUT, PictureFiles, open_pictures
from pipelines.rows import Reason, Rejected, Row, Rows, Stage, carry
from pipelines.schedule import PrepareReport, Workers, run_units
from pipelines.shards import Unit
from pipelines.stages.filter import ScoreSettings
from pipelines.stages.sign import sign_by_embedding, sign_content, sign_perceptually
from pipelines.stages.write import WriteUnit
from udiff.data.manifest import Identity, Manifest, Plan, UnitEntry, start_plan
from udiff.data.schema import tensor_field
from udiff.data.storage import Folder, open_folder
from udiff.settings import Fraction, Settings

SIGNATURES = "signatures"
DUPLICATES = "duplicates"
DECISION = "decision.json"


class DedupSettings(Settings):
    """Which pictures of a cache are duplicates."""

    input: str
    """Folder or bucket URI of the pictures cache."""
    output: str
    method: Literal["exact", "perceptual", "embedding"] = "perceptual"
    """`exact` compares all pixels, `perceptual` perceptual hashes, `embedding` those of `clip`."""
    max_distance: int = Field(default=4, ge=0, le=15)
    """Bits of 64 by which perceptual hashes of duplicates may differ."""
    min_cosine: Fraction = 0.95
    """Of the embeddings of duplicates, at least."""
    clip: str | None = None
    """Model of open_clip: `NAME:WEIGHTS` (a file or a tag), `hf-hub:ID` or `local-dir:FOLDER`."""
    batch_size: PositiveInt = 32
    """Pictures embedded together."""
    part_rows: PositiveInt = 1_000_000
    """Signatures that one task holds in memory."""
    row_group_size: PositiveInt = 256
    gpus: float = Field(default=0, ge=0)
    """GPUs of a worker that embeds; 0 for the CPU."""
    workers: PositiveInt | None = None
    """Processes; as many as the cluster has room for where it is left open."""

    @model_validator(mode="after")
    def _check(self) -> "DedupSettings":
        if (self.clip is None) == (self.method == "embedding"):
            raise ValueError("clip names the model of method embedding, and of no other")
        return self

    def rule(self) -> Rule:
        """Say what makes two signatures a pair."""
        match self.method:
            case "exact":
                return Equality()
            case "perceptual":
                return Hamming(self.max_distance)
            case "embedding":
                return Cosine(self.min_cosine)

    def score(self) -> ScoreSettings:
        """Give the settings of the model that embeds."""
        return ScoreSettings(clip=self.clip, score_batch_size=self.batch_size).absolute()


class SignChain:
    """From a file of pictures to their committed signatures."""

    def __init__(self, settings: DedupSettings, pictures: PictureFiles, plan: Plan) -> None:
        self._settings, self._pictures = settings, pictures
        if settings.method == "embedding":
            from pipelines.stages.score import Score

            score = Score(settings.score(), device="cuda" if settings.gpus else "cpu")
            if score.fingerprint() != plan.identity["signature"]["made_by"]:
                raise ValueError(f"clip {settings.clip} is another one on this machine")
            self._sign = partial(sign_by_embedding, score=score, batch_size=settings.batch_size)
        else:
            exact = settings.method == "exact"
            self._sign = partial(_sign_each, sign_content if exact else sign_perceptually)
        self._write = WriteUnit(
            open_folder(settings.output) / SIGNATURES,
            schema=_signatures_schema(plan),
            plan=plan.fingerprint,
            row_group_size=2**20,
        )

    def __call__(self, unit: Unit) -> UnitEntry:
        """Carry a unit from its file to its commit."""
        rows = [{**row, "number": n} for n, row in enumerate(self._pictures.read(unit))]
        return self._write(unit, self._sign(rows))


class DropChain:
    """From a file of pictures to the same without duplicates, committed."""

    def __init__(self, settings: DedupSettings, pictures: PictureFiles, plan: Plan) -> None:
        output = open_folder(settings.output)
        self._pictures, self._duplicates = pictures, _duplicates(output, plan)
        self._write = WriteUnit(
            output,
            schema=pictures.schema(),
            buckets=plan.buckets,
            plan=plan.fingerprint,
            row_group_size=settings.row_group_size,
        )

    def __call__(self, unit: Unit) -> UnitEntry:
        """Carry a unit from its file to its commit."""
        kept_for, rows = _read_drops(self._duplicates, unit), Rows()
        for number, row in enumerate(self._pictures.read(unit)):
            if number not in kept_for:
                rows.kept.append(row)
                continue
            detail = kept_for[number]
            rows.rejected.append(Rejected(row["key"], row["source"], Reason.DUPLICATE, detail))
        return self._write(unit, rows)


def plan_dedup(settings: DedupSettings) -> tuple[Plan, Plan]:
    """Check the input, and begin a cache or go on with the one begun; needs no Ray.

    Returns:
        The plan of the signatures, and that of the pictures that are left.

    Raises:
        FileNotFoundError: there is no finished pictures cache at `input`.
        ValueError: `input` holds no pictures, or there is another cache at `output`.
    """
    pictures, output = open_pictures(settings.input), open_folder(settings.output)
    signature, shapes = _signature(settings)
    inputs = {INPUT: pictures.fingerprint()}
    signatures = Plan(
        kind="signatures",
        identity={**pictures.manifest.identity, **signature},
        options={},
        inputs=inputs,
        shapes=shapes,
    )
    limits = settings.model_dump(mode="json", include=_LIMITS[settings.method])
    dedup: Identity = {"dedup": {**signature["signature"], **limits}}
    left = Plan(
        kind="pictures",
        identity={**pictures.manifest.identity, **dedup},
        options={"row_group_size": settings.row_group_size},
        inputs=inputs,
        shapes=pictures.manifest.shapes,
        buckets=pictures.manifest.buckets,
        class_names=pictures.manifest.class_names,
    )
    start_plan(output, left)
    start_plan(output / SIGNATURES, signatures)
    return signatures, left


def make_deduped(settings: DedupSettings, plans: tuple[Plan, Plan]) -> PrepareReport:
    """Make all units of the plans that are not there yet, on the running Ray.

    Raises:
        ValueError: too many workers, or a picture's file that is damaged.
        FailedUnitsError: some units could not be made.
    """
    signatures, left = plans
    pictures, output = open_pictures(settings.input), open_folder(settings.output)
    signed = run_units(
        partial(SignChain, settings, pictures, signatures),
        pictures.units(),
        folder=output / SIGNATURES,
        plan=signatures,
        stage="sign",
        workers=Workers(settings.workers, gpus=settings.gpus),
    )
    decide(settings, pictures, signed.manifest, plan=left)
    return run_units(
        partial(DropChain, settings, pictures, left),
        pictures.units(),
        folder=output,
        plan=left,
        stage="dedup",
        workers=Workers(settings.workers),
    )


def decide(
    settings: DedupSettings, pictures: PictureFiles, signed: Manifest, *, plan: Plan
) -> None:
    """Find out what is dropped, unless that is known; on the running Ray, nothing here."""
    output = open_folder(settings.output)
    duplicates = _duplicates(output, plan)
    if duplicates.exists(DECISION):
        return
    files, rule = _files(output / SIGNATURES, pictures, signed), settings.rule()
    num_rows = files.starts[-1]
    num_parts = math.ceil(num_rows / settings.part_rows)
    find = ray.remote(max_retries=2)(find_pairs)
    found = [
        find.remote(files, rule, table, part, num_parts)
        for table in range(rule.tables(num_rows))
        for part in range(num_parts)
    ]
    write = ray.remote(max_retries=2)(_write_decision)
    ray.get(write.remote(duplicates, files, found))


def _write_decision(folder: Folder, files: Files, found: Sequence["ray.ObjectRef[Pairs]"]) -> None:
    dropped, kept = resolve(ray.get(list(found)))
    for path, table in drop_lists(files, dropped, kept):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        folder.write(Path(path).name, sink.getvalue())
    folder.write(DECISION, json.dumps({"dropped": len(dropped)}).encode())


def _duplicates(output: Folder, plan: Plan) -> Folder:
    """Name the folder of the decision: none of an earlier plan is taken for it."""
    return output / DUPLICATES / plan.fingerprint[:16]


def _read_drops(folder: Folder, unit: Unit) -> dict[int, str]:
    """Read, per row to drop, the key of the row that is kept for it."""
    name = f"{unit.name}.parquet"
    if not folder.exists(name):
        return {}
    with folder.open(name) as file:
        table = pq.read_table(file)
    return dict(zip(table["row"].to_pylist(), table["kept"].to_pylist(), strict=True))


def _files(folder: Folder, pictures: PictureFiles, signed: Manifest) -> Files:
    starts, start = {}, 0
    for unit in pictures.units():
        starts[unit.name] = start
        start += unit.num_samples
    paths = tuple(file.path for file in signed.files)
    return Files(folder, paths, (*(starts[Path(path).stem] for path in paths), start))


def _sign_each(stage: Stage, rows: Sequence[Row]) -> Rows:
    return carry(rows, stage)


_LIMITS: dict[str, set[str]] = {
    "exact": set(),
    "perceptual": {"max_distance"},
    "embedding": {"min_cosine"},
}


def _signature(settings: DedupSettings) -> tuple[Identity, dict[str, tuple[int, ...]]]:
    """Say what makes a signature, and the shape of its columns."""
    if settings.method != "embedding":
        return {"signature": {"method": settings.method}}, {}
    from PIL import Image

    from pipelines.stages.score import Score

    score = Score(settings.score(), device="cpu")
    width = score.embed([Image.new("RGB", (8, 8))]).shape[1]
    identity: Identity = {"signature": {"method": "embedding", "made_by": score.fingerprint()}}
    return identity, {"embedding": (width,)}


def _signatures_schema(plan: Plan) -> pa.Schema:
    columns = {
        "row": pa.int32(),
        "key": pa.string(),
        "pixels": pa.int64(),
        "identity": pa.int64(),
        "comparable": pa.bool_(),
    }
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
    return pa.schema([*fields, *(tensor_field(*shape) for shape in plan.shapes.items())])
