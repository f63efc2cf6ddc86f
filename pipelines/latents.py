"""Chain: a cache of pictures -> a cache of latents, encoded texts and features.

read -> encode -> write, all in the actor that has the unit; a unit is one file of the pictures. All
columns of the pictures are carried along but the picture itself.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.latents_settings import LatentsSettings
from pipelines.rows import Row
from pipelines.schedule import PrepareReport, Workers, run_units
from pipelines.shards import Unit
from pipelines.stages.write import WriteUnit
from udiff.data.manifest import (
    MANIFEST,
    PLAN,
    Identity,
    Manifest,
    Plan,
    UnitEntry,
    identity_difference,
    read_manifest,
    start_plan,
)
from udiff.data.storage import Folder, open_folder

if TYPE_CHECKING:
    from pipelines.encoders import Encoders


class LatentsChain:
    """All stages from a file of pictures to its committed unit."""

    def __init__(self, settings: LatentsSettings, plan: Plan) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        torch.backends.cudnn.deterministic = True
        self._pictures = open_folder(settings.input)
        manifest = read_manifest(self._pictures)
        self._size = _size(manifest)
        self._encode = _load_encoders(settings, settings.device)
        _check_identity(self._encode, plan)
        self._write = WriteUnit(
            open_folder(settings.output),
            schema=pa.schema([*_carried(settings, manifest), *self._encode.fields(plan.shapes)]),
            texts=self._encode.text_columns(plan.shapes),
            plan=plan.fingerprint,
            row_group_size=settings.row_group_size,
        )

    def __call__(self, unit: Unit) -> UnitEntry:
        """Carry a unit from its file to its commit."""
        return self._write(unit, self._encode(read_pictures(self._pictures, unit), self._size))


def read_pictures(pictures: Folder, unit: Unit) -> list[Row]:
    """Read a file of a pictures cache.

    Raises:
        ValueError: the file is damaged, or has not the rows that the manifest says.
    """
    with pictures.open(unit.source) as file:
        rows = pq.read_table(file).to_pylist()
    if len(rows) != unit.num_samples:
        raise ValueError(
            f"{pictures}/{unit.source} holds {len(rows)} rows, the manifest says {unit.num_samples}"
        )
    return rows


def plan_latents(settings: LatentsSettings) -> Plan:
    """Check input and encoders, and begin a cache or go on with the one begun; needs no Ray.

    Raises:
        FileNotFoundError: there is no finished pictures cache at `input`, or no such encoder.
        ValueError: `input` holds no pictures, or there is another cache at `output`.
    """
    pictures = open_folder(settings.input)
    manifest = read_manifest(pictures)
    if manifest.kind != "pictures":
        raise ValueError(f"{pictures} is a cache of {manifest.kind}: latents come from pictures")
    _check_sources(settings, manifest)
    encoders = _load_encoders(settings, "cpu")
    plan = _plan(settings, manifest, encoders)
    start_plan(open_folder(settings.output), plan)
    return plan


def make_latents(settings: LatentsSettings, plan: Plan) -> PrepareReport:
    """Make all units of a plan that are not there yet, on the running Ray.

    Raises:
        ValueError: too many workers, or nothing that could be cached.
        FailedUnitsError: some units could not be made.
    """
    manifest = read_manifest(settings.input)
    units = [Unit(Path(file.path).stem, file.path, file.rows) for file in manifest.files]
    return run_units(
        partial(LatentsChain, settings.absolute(), plan),
        units,
        folder=open_folder(settings.output),
        plan=plan,
        workers=Workers(settings.workers, cpus=settings.threads, gpus=settings.gpus),
    )


def _load_encoders(settings: LatentsSettings, device: str) -> "Encoders":
    from pipelines.encoders import load_encoders  # loads torch

    return load_encoders(settings, device=device)


def _check_identity(encoders: "Encoders", plan: Plan) -> None:
    wanted: Identity = {name: plan.identity[name] for name in encoders.identity}
    if differences := identity_difference(wanted, encoders.identity):
        raise ValueError(f"the encoders are others on this machine: {'; '.join(differences)}")


def _check_sources(settings: LatentsSettings, manifest: Manifest) -> None:
    names = _read_schema(open_folder(settings.input), manifest).names
    for text in settings.texts:
        if text.source not in names:
            raise ValueError(
                f"texts.{text.name}.source {text.source!r} is no column of {settings.input}, "
                f"which has {', '.join(names)}"
            )


def _size(manifest: Manifest) -> tuple[int, int]:
    height, width, _ = manifest.shapes["image"]
    return height, width


def _carried(settings: LatentsSettings, manifest: Manifest) -> list[pa.Field]:
    schema = _read_schema(open_folder(settings.input), manifest)
    return [field for field in schema if settings.keep_image or field.name != "image"]


def _read_schema(pictures: Folder, manifest: Manifest) -> pa.Schema:
    with pictures.open(manifest.files[0].path) as file:
        return pq.read_schema(file)


def _plan(settings: LatentsSettings, manifest: Manifest, encoders: "Encoders") -> Plan:
    pictures = open_folder(settings.input)
    content = hashlib.sha256(pictures.read(MANIFEST) + pictures.read(PLAN)).hexdigest()
    image = {"image": manifest.shapes["image"]} if settings.keep_image else {}
    return Plan(
        kind="latents",
        identity={**manifest.identity, **encoders.identity},
        options={
            "batch_size": settings.batch_size,
            "row_group_size": settings.row_group_size,
            "threads": settings.threads,
            "device": settings.device,
        },
        inputs={"pictures": content},
        shapes=encoders.shapes(*_size(manifest)) | image,
        class_names=manifest.class_names,
    )
