"""Chain: web shards -> a cache of square pictures.

read -> label -> decode -> size -> crop -> PNG -> write, all in the actor that has the unit.
"""

from functools import partial
from typing import Any, Literal

from pydantic import Field, PositiveInt

from pipelines.rows import carry
from pipelines.schedule import PrepareReport, Workers, run_tasks, run_units
from pipelines.shards import Unit
from pipelines.source import Source, open_source
from pipelines.stages.crop import Fit, crop
from pipelines.stages.decode import decode
from pipelines.stages.filter import check_caption, check_label, check_size
from pipelines.stages.write import WriteUnit, encode_png
from udiff.data.manifest import Plan, UnitEntry, start_plan
from udiff.data.schema import pictures_schema
from udiff.data.storage import open_folder
from udiff.settings import Settings


class PicturesSettings(Settings):
    """What a pictures cache is made from, and how."""

    input: str
    """Folder or bucket URI of the shards."""
    output: str
    size: PositiveInt
    """Side of the square in pixels."""
    fit: Fit = "crop"
    """`crop` scales the shorter side to `size` and cuts; `pad` puts black around, unscaled."""
    captions: Literal["required", "optional"] = "required"
    class_names: tuple[str, ...] = ()
    """With names, every picture must have a label below their number."""
    min_side: int = Field(default=0, ge=0)
    """Smallest shorter side of a picture that is taken."""
    max_pixels: int = Field(default=89_478_485, gt=0, le=89_478_485)
    """Most pixels of a picture that is decoded; the limit of the limit is Pillow's own."""
    unit_rows: PositiveInt = 1000
    """Samples that are done in one go, and lost when a job is killed."""
    row_group_size: PositiveInt = 256
    workers: PositiveInt | None = None
    """Processes; as many as the cluster has CPUs where it is left open."""


class PicturesChain:
    """All stages from a piece of a source to its committed unit."""

    def __init__(self, settings: PicturesSettings, source: Source, write: WriteUnit) -> None:
        self._source = source
        self._stages = (
            source.take,
            partial(check_caption, required=settings.captions == "required"),
            partial(
                check_label, num_classes=len(settings.class_names or source.class_names) or None
            ),
            partial(decode, max_pixels=settings.max_pixels),
            partial(check_size, min_side=settings.min_side),
            partial(crop, size=settings.size, fit=settings.fit),
            encode_png,
        )
        self._write = write

    def __call__(self, unit: Unit) -> UnitEntry:
        """Carry a unit from its source to its commit."""
        return self._write(unit, carry(self._source.read(unit), *self._stages))


def plan_pictures(settings: PicturesSettings) -> Plan:
    """Check the input, and begin a cache or go on with the one begun; needs no Ray.

    Raises:
        FileNotFoundError: no input, or an incomplete one.
        ValueError: there is another cache at `output`.
    """
    plan = _plan(settings, open_source(settings.input))
    start_plan(open_folder(settings.output), plan)
    return plan


def make_pictures(settings: PicturesSettings, plan: Plan) -> PrepareReport:
    """Make all units of a plan that are not there yet, on the running Ray.

    Raises:
        ValueError: a damaged shard, too many workers, or nothing that could be cached.
        FailedUnitsError: some units could not be made.
    """
    source, output = open_source(settings.input), open_folder(settings.output)
    arguments = [(source, output, *file, settings.unit_rows) for file in plan.inputs.items()]
    cuts = run_tasks(_cut, arguments)
    write = WriteUnit(
        output,
        schema=pictures_schema(settings.size),
        plan=plan.fingerprint,
        row_group_size=settings.row_group_size,
    )
    return run_units(
        partial(PicturesChain, settings, source, write),
        [unit for units in cuts for unit in units],
        folder=output,
        plan=plan,
        workers=Workers(settings.workers),
    )


def _cut(source: Source, *arguments: Any) -> list[Unit]:
    return source.cut(*arguments)


def _plan(settings: PicturesSettings, source: Source) -> Plan:
    image = {
        "size": settings.size,
        "fit": settings.fit,
        "min_side": settings.min_side,
        "max_pixels": settings.max_pixels,
        "captions": settings.captions,
    }
    return Plan(
        kind="pictures",
        identity={"image": image},
        options={"unit_rows": settings.unit_rows, "row_group_size": settings.row_group_size},
        inputs={**source.fingerprints()},
        shapes={"image": (settings.size, settings.size, 3)},
        class_names=settings.class_names or source.class_names,
    )
