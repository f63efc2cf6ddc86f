"""Chain: a cache of pictures -> a cache of latents, encoded texts and features.

(read -> decode) -> encode -> write; a unit is one file of the pictures. The first half needs no
encoder, so that tasks on any machine can do it for the actors that encode. All columns of the
pictures are carried along but the picture itself.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.latents_settings import LatentsSettings
from pipelines.picture_files import INPUT, PictureFiles, open_pictures
from pipelines.rows import Rows, cut
from pipelines.schedule import PrepareReport, Readers, Workers, run_units
from pipelines.shards import Unit
from pipelines.stages.decode_batch import Batch, ahead, decode_batch
from pipelines.stages.write import WriteUnit
from pipelines.update import carry_over_files
from udiff.data.manifest import (
    Identity,
    Plan,
    UnitEntry,
    identity_difference,
    start_plan,
)
from udiff.data.storage import open_folder

if TYPE_CHECKING:
    from pipelines.encoders import Encoders


_MAX_DECODED_BYTES = 2**30


@dataclass(frozen=True)
class ReadUnit:
    """What the first half of the chain makes of a unit."""

    content: str
    """Hash of the file."""
    batches: Iterable[Batch]


@dataclass(frozen=True)
class ReadPictures:
    """First half of the chain: a file of pictures -> decoded batches, all of them at once."""

    pictures: PictureFiles
    batch_size: int
    decodes: bool
    """Whether the pictures are looked at."""
    keep_image: bool

    def __call__(self, unit: Unit) -> ReadUnit:
        """Read a unit whole, to be sent to where it is encoded."""
        read = self.stream(unit)
        return replace(read, batches=list(read.batches))

    def stream(self, unit: Unit) -> ReadUnit:
        """Read a unit and decode its batches one ahead of whoever takes them."""
        content = self.pictures.load(unit)
        rows = self.pictures.parse(unit, content)
        batches: Iterable[Batch] = [Batch(Rows(kept=rows))]
        if self.decodes:
            size = self.pictures.size(self.pictures.bucket(unit))
            decode = partial(decode_batch, size=size, keep_image=self.keep_image)
            batches = ahead(decode, cut(rows, self.batch_size))
        return ReadUnit(hashlib.sha256(content).hexdigest(), batches)


class LatentsChain:
    """All stages from a file of pictures to its committed unit."""

    def __init__(self, settings: LatentsSettings, plan: Plan) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        torch.backends.cudnn.deterministic = True
        pictures = open_pictures(settings.input)
        self._read = _reading(settings, pictures)
        self._encode = _load_encoders(settings, settings.device)
        _check_identity(self._encode, plan)
        shapes = {**plan.shapes, **next(iter(plan.buckets.values()), {})}
        self._write = WriteUnit(
            open_folder(settings.output),
            schema=pa.schema([*_carried(settings, pictures), *self._encode.fields(shapes)]),
            texts=self._encode.text_columns(plan.shapes),
            buckets=plan.buckets,
            plan=plan.fingerprint,
            row_group_size=settings.row_group_size,
        )

    def __call__(self, unit: Unit) -> UnitEntry:
        """Carry a unit from its file to its commit."""
        return self.finish(unit, self._read.stream(unit))

    def finish(self, unit: Unit, read: ReadUnit) -> UnitEntry:
        """Carry a unit from its decoded pictures to its commit."""
        return self._write(unit, self._encode(read.batches), content=read.content)


def plan_latents(settings: LatentsSettings) -> Plan:
    """Check input and encoders, and begin a cache or go on with the one begun; needs no Ray.

    Raises:
        FileNotFoundError: there is no finished pictures cache at `input`, or no such encoder.
        ValueError: `input` holds no pictures, or there is another cache at `output`.
    """
    pictures = open_pictures(settings.input)
    _check_sources(settings, pictures)
    encoders = _load_encoders(settings, "cpu")
    plan = _plan(settings, pictures, encoders)
    start_plan(open_folder(settings.output), plan, update=settings.update)
    return plan


def make_latents(settings: LatentsSettings, plan: Plan) -> PrepareReport:
    """Make all units of a plan that are not there yet, on the running Ray.

    Raises:
        ValueError: too many workers, or nothing that could be cached.
        FailedUnitsError: some units could not be made.
    """
    pictures, output = open_pictures(settings.input), open_folder(settings.output)
    carry_over_files(output, plan, pictures)
    return run_units(
        partial(LatentsChain, settings.absolute(), plan),
        pictures.units(),
        folder=output,
        plan=plan,
        stage="latents",
        workers=Workers(settings.workers, cpus=settings.threads, gpus=settings.gpus),
        readers=Readers(_reading(settings, pictures), count_decoders(settings, pictures)),
    )


def count_decoders(settings: LatentsSettings, pictures: PictureFiles) -> int | None:
    """Give the number asked for, None for any; 0 where none is of use.

    Unless they are asked for there are none where a unit is so large that those which are decoded
    ahead would take too much memory.
    """
    sizes = (file.rows * 3 * prod(pictures.size(file.bucket)) for file in pictures.manifest.files)
    is_large = settings.decoders is None and max(sizes) > _MAX_DECODED_BYTES
    return 0 if is_large or not settings.encodes_pictures else settings.decoders


def _reading(settings: LatentsSettings, pictures: PictureFiles) -> ReadPictures:
    return ReadPictures(
        pictures,
        batch_size=settings.batch_size,
        decodes=settings.encodes_pictures,
        keep_image=settings.keep_image,
    )


def _load_encoders(settings: LatentsSettings, device: str) -> "Encoders":
    from pipelines.encoders import load_encoders  # loads torch

    return load_encoders(settings, device=device)


def _check_identity(encoders: "Encoders", plan: Plan) -> None:
    wanted: Identity = {name: plan.identity[name] for name in encoders.identity}
    if differences := identity_difference(wanted, encoders.identity):
        raise ValueError(f"the encoders are others on this machine: {'; '.join(differences)}")


def _check_sources(settings: LatentsSettings, pictures: PictureFiles) -> None:
    names = pictures.schema().names
    for text in settings.texts:
        if text.column not in names:
            raise ValueError(
                f"texts.{text.name}.source {text.source!r} is no column of {settings.input}, "
                f"which has {', '.join(names)}"
            )


def _carried(settings: LatentsSettings, pictures: PictureFiles) -> list[pa.Field]:
    return [field for field in pictures.schema() if settings.keep_image or field.name != "image"]


def _plan(settings: LatentsSettings, pictures: PictureFiles, encoders: "Encoders") -> Plan:
    manifest, kept = pictures.manifest, ("image",) if settings.keep_image else ()

    def shapes(bucket: str) -> dict[str, tuple[int, ...]]:
        known = manifest.buckets.get(bucket, manifest.shapes)
        carried = {name: known[name] for name in kept}
        return encoders.picture_shapes(*pictures.size(bucket)) | carried

    buckets = {bucket: shapes(bucket) for bucket in manifest.buckets}
    return Plan(
        kind="latents",
        identity={**manifest.identity, **encoders.identity},
        options=settings.options(),
        inputs={INPUT: pictures.fingerprint()},
        shapes=encoders.text_shapes() | ({} if buckets else shapes("")),
        buckets=buckets,
        class_names=manifest.class_names,
    )
