"""Chain: a pictures cache -> the same with captions of a vision-language model beside its own.

read -> caption -> sanity -> write, all in the actor that has the unit; a unit is one file.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pydantic import Field, PositiveInt, model_validator

from pipelines.network_settings import NetworkSettings
from pipelines.picture_files import INPUT, PictureFiles, open_pictures
from pipelines.recaption_vllm import CAPTIONS, StoredCaptions, caption_units, check_installed
from pipelines.rows import Row, Rows
from pipelines.schedule import PrepareReport, Workers, run_units
from pipelines.shards import Unit
from pipelines.stages.write import WriteUnit
from pipelines.update import carry_over_files
from udiff.data.manifest import Plan, UnitEntry, committed_units, start_plan
from udiff.data.schema import recaption_field
from udiff.data.storage import Folder, open_folder
from udiff.settings import Fraction

Caption = Callable[[str, Sequence[Row]], Rows]
"""Captions the rows of a unit, whose name comes first."""


class RecaptionSettings(NetworkSettings):
    """Who captions, what it is asked, and what is taken of its answers."""

    input: str
    """Folder or bucket URI of the pictures cache."""
    output: str
    update: bool = False
    """Go on with a cache whose pictures have changed: caption only the files that are others."""
    model: str
    """Hub id or folder of an image-text-to-text model of transformers."""
    prompts: tuple[str, ...] = ()
    """Each gives captions of its own; models that do not chat begin every caption with it."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """`vllm` asks vLLM through `ray.data.llm`, where it is installed."""
    num_captions: PositiveInt = 1
    """Of each prompt; more than one must be sampled."""
    max_tokens: PositiveInt = 128
    """Tokens that are generated, at most."""
    temperature: float = Field(default=0, ge=0)
    """0 takes the likeliest token."""
    top_p: Fraction = 1.0
    """Share of the probability that tokens are sampled from."""
    seed: int = 0
    max_chars: PositiveInt = 1000
    """Longest caption that is kept."""
    min_captions: int = Field(default=1, ge=0)
    """New captions that a row must have; 0 keeps every row."""
    batch_size: PositiveInt = 8
    """Pictures captioned together; changes sampled captions."""

    @model_validator(mode="after")
    def _check(self) -> "RecaptionSettings":
        if self.num_captions > 1 and not self.temperature:
            raise ValueError(
                f"num_captions {self.num_captions} without sampling gives one caption again and "
                "again: set temperature above 0, or ask several prompts"
            )
        return self

    def absolute(self) -> "RecaptionSettings":
        """Give the same with absolute paths: actors have another working directory."""
        if not Path(self.model).exists():
            return self
        return self.model_copy(update={"model": str(Path(self.model).absolute())})


class RecaptionChain:
    """All stages from a file of pictures to its committed unit."""

    def __init__(self, settings: RecaptionSettings, pictures: PictureFiles, plan: Plan) -> None:
        import torch

        from pipelines.stages.recaption import Recaption, fingerprint_model
        from pipelines.stages.sane import keep_sane

        torch.set_num_threads(settings.threads)
        torch.backends.cudnn.deterministic = True
        if fingerprint_model(settings.model) != plan.identity["recaption"]["model"]:
            raise ValueError(f"model {settings.model} is another one on this machine")
        self._pictures = pictures
        self._caption: Caption
        if settings.engine == "vllm":
            self._caption = StoredCaptions(_captions(settings, plan))
        else:
            self._caption = Recaption(settings, device=settings.device)
        self._check = partial(keep_sane, settings=settings)
        self._write = WriteUnit(
            open_folder(settings.output),
            schema=_schema(pictures),
            buckets=plan.buckets,
            plan=plan.fingerprint,
            row_group_size=settings.row_group_size,
        )

    def __call__(self, unit: Unit) -> UnitEntry:
        """Carry a unit from its file to its commit."""
        content = self._pictures.load(unit)
        captioned = self._caption(unit.name, self._pictures.parse(unit, content))
        rows = Rows(rejected=captioned.rejected)
        for row in captioned.kept:
            rows.add(row, self._check)
        return self._write(unit, rows, content=hashlib.sha256(content).hexdigest())


def plan_recaption(settings: RecaptionSettings) -> Plan:
    """Check input and model, and begin a cache or go on with the one begun; needs no Ray.

    Raises:
        FileNotFoundError: there is no finished pictures cache at `input`.
        ValueError: `input` holds no pictures, there is another cache at `output`, no such engine
            here, or no such model.
    """
    from pipelines.stages.recaption import check_model, fingerprint_model

    if settings.engine == "vllm":
        check_installed()
    pictures = open_pictures(settings.input)
    check_model(settings.model)
    asked = settings.model_dump(mode="json", include=_DECIDES)
    recaption = {**asked, "model": fingerprint_model(settings.model)}
    if earlier := pictures.manifest.identity.get("recaption"):
        recaption["after"] = earlier
    plan = Plan(
        kind="pictures",
        identity={**pictures.manifest.identity, "recaption": recaption},
        options=settings.options(),
        inputs={INPUT: pictures.fingerprint()},
        shapes=pictures.manifest.shapes,
        buckets=pictures.manifest.buckets,
        class_names=pictures.manifest.class_names,
    )
    start_plan(open_folder(settings.output), plan, update=settings.update)
    return plan


def make_recaptioned(settings: RecaptionSettings, plan: Plan) -> PrepareReport:
    """Make all units of a plan that are not there yet, on the running Ray.

    Raises:
        ValueError: too many workers, or nothing that could be cached.
        FailedUnitsError: some units could not be made.
    """
    pictures, settings = open_pictures(settings.input), settings.absolute()
    output = open_folder(settings.output)
    carry_over_files(output, plan, pictures)
    if settings.engine == "vllm":
        done = committed_units(output)
        missing = [unit for unit in pictures.units() if unit.name not in done]
        caption_units(settings, pictures, missing, _captions(settings, plan))
    return run_units(
        partial(RecaptionChain, settings, pictures, plan),
        pictures.units(),
        folder=output,
        plan=plan,
        stage="recaption",
        workers=Workers(settings.workers, cpus=settings.threads, gpus=settings.gpus),
    )


_DECIDES = {
    "engine",
    "prompts",
    "num_captions",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "max_chars",
    "min_captions",
    "precision",
}


def _captions(settings: RecaptionSettings, plan: Plan) -> Folder:
    """Name the folder of vLLM's answers: none of an earlier plan's are taken."""
    return open_folder(settings.output) / CAPTIONS / plan.fingerprint[:16]


def _schema(pictures: PictureFiles) -> pa.Schema:
    """Put the captions before the picture, in place of those of an earlier run."""
    fields = [field for field in pictures.schema() if field.name != "recaption"]
    place = [field.name for field in fields].index("caption") + 1
    return pa.schema([*fields[:place], recaption_field(), *fields[place:]])
