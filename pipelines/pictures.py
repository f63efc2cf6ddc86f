"""Chain: web shards -> a cache of square pictures, or of rectangles of a few sizes.

read -> metadata -> label -> language -> header -> size -> decode -> crop -> score -> PNG -> write,
all in the actor that has the unit.
"""

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from PIL import ImageColor
from pydantic import Field, JsonValue, PositiveInt, field_validator, model_validator

from pipelines.rows import Rows, Stage, carry
from pipelines.schedule import PrepareReport, Workers, run_tasks, run_units
from pipelines.shards import Unit
from pipelines.source import Kind, Source, open_source
from pipelines.stages.converse import take_conversation
from pipelines.stages.crop import Bucket, Fit, crop, crop_to_bucket
from pipelines.stages.decode import decode, identify
from pipelines.stages.filter import (
    Filters,
    ScoreSettings,
    check_caption,
    check_label,
    check_language,
    check_metadata,
    check_size,
)
from pipelines.stages.write import WriteUnit, encode_png
from pipelines.update import Fingerprinted, carry_over, find_kept, hash_unit
from udiff.data.manifest import Plan, UnitEntry, has_plan, start_plan
from udiff.data.schema import conversation_field, pictures_schema
from udiff.data.storage import Folder, open_folder
from udiff.settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.stages.score import Score


class PicturesSettings(Settings):
    """What a pictures cache is made from, and how."""

    input: str
    """Path or bucket URI of shards, of a list or table, or of a folder of pictures."""
    source: Kind | None = None
    """What `input` is; found by what is there where it is left open."""
    pictures: str = ""
    """Folder that the paths in a list are relative to, if not the list's own."""
    output: str
    size: PositiveInt | None = None
    """Side of the square in pixels."""
    buckets: tuple[Bucket, ...] = ()
    """Heights and widths, in place of `size`: a picture goes to the one whose aspect ratio is
    nearest, and each has its own files."""
    fit: Fit = "crop"
    """`crop` scales the shorter side to `size` and cuts; `pad` puts black around, unscaled."""
    captions: Literal["required", "optional"] = "required"
    conversations: bool = False
    """Take conversations about the pictures too (column `conversation`), and only rows with one."""
    class_names: tuple[str, ...] = ()
    """With names, every picture must have a label below their number."""
    background: str = "white"
    """What shows where a picture is transparent; a color by a name of CSS or as `#rrggbb`."""
    jpeg: Literal["full", "draft"] = "full"
    """`draft` decodes JPEGs no larger than 2 to 4 times `size`: faster, and other pixels."""
    filters: Filters = Filters()
    score: ScoreSettings = ScoreSettings()
    max_pixels: int = Field(default=89_478_485, gt=0, le=89_478_485)
    """Most pixels of a picture that is decoded; the limit of the limit is Pillow's own."""
    unit_rows: PositiveInt = 1000
    """Samples that are done in one go, and lost when a job is killed."""
    row_group_size: PositiveInt = 256
    update: bool = False
    """Take over what is the same in a cache of another input."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of a worker, for the scores; 0 for the CPU."""
    workers: PositiveInt | None = None
    """Processes; as many as the cluster has room for where it is left open."""

    @field_validator("buckets", mode="before")
    @classmethod
    def _read_buckets(cls, buckets: Any) -> Any:
        """Read `512x384` as a height and a width."""
        if not isinstance(buckets, list | tuple):
            return buckets
        return [b.split("x") if isinstance(b, str) else b for b in buckets]

    @model_validator(mode="after")
    def _check_size(self) -> "PicturesSettings":
        if (self.size is None) == (not self.buckets):
            raise ValueError("give either size or buckets")
        if len(set(self.buckets)) < len(self.buckets) or any(min(b) < 1 for b in self.buckets):
            raise ValueError(f"buckets must be different and above 0, got {self.buckets}")
        if self.buckets and self.fit != "crop":
            raise ValueError(f"fit must be crop where there are buckets, got {self.fit}")
        return self

    @property
    def sizes(self) -> tuple[Bucket, ...]:
        """All sizes that pictures are brought to."""
        return self.buckets or (Bucket(self.size or 0, self.size or 0),)

    @field_validator("background")
    @classmethod
    def _check_background(cls, color: str) -> str:
        ImageColor.getrgb(color)  # raises a ValueError that names it
        return color


class PicturesChain:
    """All stages from a piece of a source to its committed unit."""

    def __init__(
        self, settings: PicturesSettings, source: Source, write: WriteUnit, *, made_by: JsonValue
    ) -> None:
        filters, largest = settings.filters, max(map(max, settings.sizes))
        draft = 2 * largest if settings.jpeg == "draft" else None
        num_classes = len(settings.class_names or source.class_names) or None
        self._source = source
        talks = (take_conversation,) if settings.conversations else ()
        self._stages = (
            *talks,
            partial(check_caption, required=settings.captions == "required"),
            partial(check_metadata, filters=filters),
            partial(check_label, num_classes=num_classes),
            partial(check_language, languages=filters.languages),
            partial(identify, max_pixels=settings.max_pixels),
            partial(check_size, min_side=filters.min_side, max_aspect=filters.max_aspect),
            partial(decode, background=settings.background, draft_side=draft),
            _crop(settings),
        )
        self._batch_size = settings.score.score_batch_size
        self._score, found = load_score(settings)
        if found != made_by:
            raise ValueError(f"clip {settings.score.clip} is another one on this machine")
        self._write = write

    def __call__(self, unit: Unit) -> UnitEntry:
        """Carry a unit from its source to its commit."""
        rows, read, take = Rows(), self._source.read(unit), Fingerprinted(self._source.take)
        # A few at a time: what is decoded takes far more memory than what is cached.
        while batch := list(islice(read, self._batch_size)):
            part = carry(batch, take, *self._stages)
            if self._score is not None:
                part = self._score(part)
            stored = carry(part.kept, encode_png)
            rows.kept += stored.kept
            rows.rejected += part.rejected
        return self._write(unit, rows, content=take.hexdigest())


def load_score(settings: PicturesSettings) -> "tuple[Score | None, str | None]":
    """Load the models that score pictures, and their fingerprint; None where none is wanted."""
    if settings.score.clip is None:
        return None, None
    from pipelines.stages.score import Score

    score = Score(settings.score, device="cuda" if settings.gpus else "cpu")
    return score, score.fingerprint()


def plan_pictures(settings: PicturesSettings) -> Plan:
    """Check the input, and begin a cache or go on with the one begun; needs no Ray.

    Raises:
        FileNotFoundError: no input, or an incomplete one.
        ValueError: there is another cache at `output`.
    """
    plan = _plan(settings, _open(settings))
    start_plan(open_folder(settings.output), plan, update=settings.update)
    return plan


def make_pictures(settings: PicturesSettings, plan: Plan) -> PrepareReport:
    """Make all units of a plan that are not there yet, on the running Ray.

    Raises:
        ValueError: a damaged shard, too many workers, or nothing that could be cached.
        FailedUnitsError: some units could not be made.
    """
    source, output = _open(settings), open_folder(settings.output)
    arguments = [(source, output, *file, settings.unit_rows) for file in plan.inputs.items()]
    cuts = run_tasks(_cut, arguments)
    if not has_plan(output, plan):
        _update(output, plan, source, dict(zip(plan.inputs, cuts, strict=True)))
    write = WriteUnit(
        output,
        schema=pictures_fields(settings),
        buckets=plan.buckets,
        plan=plan.fingerprint,
        row_group_size=settings.row_group_size,
    )
    settings = settings.model_copy(update={"score": settings.score.absolute()})
    chain = partial(PicturesChain, made_by=plan.identity["image"].get("scored_by"))
    return run_units(
        partial(chain, settings, source, write),
        [unit for units in cuts for unit in units],
        folder=output,
        plan=plan,
        stage="pictures",
        workers=Workers(settings.workers, gpus=settings.gpus),
    )


def _crop(settings: PicturesSettings) -> Stage:
    if settings.size is None:
        return partial(crop_to_bucket, buckets=settings.buckets)
    return partial(crop, size=settings.size, fit=settings.fit)


def _update(output: Folder, plan: Plan, source: Source, units: dict[str, list[Unit]]) -> None:
    """Take the units out whose rows have changed or are gone, so that they are made again."""

    def hash_units(changed: list[Unit]) -> list[str]:
        return run_tasks(hash_unit, [(source, unit) for unit in changed])

    carry_over(output, plan, find_kept(output, plan, units, hash_units))


def pictures_fields(settings: PicturesSettings) -> "pa.Schema":
    """Describe the columns of the cache; of several sizes, those of the first."""
    schema = pictures_schema(settings.sizes[0], scores=settings.score.columns())
    return schema.append(conversation_field()) if settings.conversations else schema


def _open(settings: PicturesSettings) -> Source:
    return open_source(settings.input, settings.source, pictures=settings.pictures)


def _cut(source: Source, *arguments: Any) -> list[Unit]:
    return source.cut(*arguments)


def _plan(settings: PicturesSettings, source: Source) -> Plan:
    decided_by = ("size", "buckets", "fit", "background", "jpeg", "max_pixels", "captions")
    image = settings.model_dump(mode="json", include={*decided_by, "filters", "score"})
    scores = image.pop("score")
    conversation = {"conversation": {"turns": "all"}} if settings.conversations else {}
    if settings.score.clip is not None:
        limits = {name: scores[name] for name in ("min_clip_score", "min_aesthetic")}
        image |= {**limits, "scored_by": load_score(settings)[1]}
    return Plan(
        kind="pictures",
        identity={"image": image, **conversation},
        options={"unit_rows": settings.unit_rows, "row_group_size": settings.row_group_size},
        inputs={**source.fingerprints()},
        shapes={} if settings.buckets else {"image": (*settings.sizes[0], 3)},
        buckets={bucket.name: {"image": (*bucket, 3)} for bucket in settings.buckets},
        class_names=settings.class_names or source.class_names,
    )
