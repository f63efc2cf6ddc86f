"""Chain: a cache of pictures -> a cache of latents.

read -> encode -> write, all in the actor that has the unit; a unit is one file of the pictures.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow.parquet as pq
from pydantic import Field, JsonValue, PositiveInt

from pipelines.rows import Row
from pipelines.schedule import PrepareReport, Workers, run_units
from pipelines.shards import Unit
from pipelines.stages.write import WriteUnit
from udiff.data.manifest import (
    MANIFEST,
    PLAN,
    Manifest,
    Plan,
    UnitEntry,
    read_manifest,
    start_plan,
)
from udiff.data.schema import latents_schema
from udiff.data.storage import Folder, open_folder
from udiff.settings import Settings

if TYPE_CHECKING:
    from pipelines.stages.encode_image import EncodeImage

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class LatentsSettings(Settings):
    """What a latents cache is made from, and how."""

    input: str
    """Folder or bucket URI of the pictures cache."""
    output: str
    autoencoder: str
    """Hub id, a diffusers folder, or a bundle of an autoencoder family."""
    keep_image: bool = False
    """Carry the pictures along, for teachers that look at them in training."""
    batch_size: PositiveInt = 32
    """Pictures per network call; changes the last bits of the latents."""
    precision: Literal["fp32", "bf16"] = "fp32"
    row_group_size: PositiveInt = 256
    threads: PositiveInt = 1
    """CPU threads of a worker; changes the last bits of the latents."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of a worker, 0 for the CPU; changes the last bits of the latents."""
    workers: PositiveInt | None = None
    """Processes; as many as the cluster has room for where it is left open."""

    @property
    def device(self) -> str:
        """Where the network runs."""
        return "cuda" if self.gpus else "cpu"


class LatentsChain:
    """All stages from a file of pictures to its committed unit."""

    def __init__(
        self,
        settings: LatentsSettings,
        pictures: Folder,
        write: WriteUnit,
        *,
        size: int,
        made_by: JsonValue,
    ) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        torch.backends.cudnn.deterministic = True
        self._pictures = pictures
        self._encode, found = load_encoder(settings, size=size, device=settings.device)
        if found != made_by:
            raise ValueError(f"autoencoder {settings.autoencoder} is another one on this machine")
        self._write = write

    def __call__(self, unit: Unit) -> UnitEntry:
        """Carry a unit from its file to its commit."""
        return self._write(unit, self._encode(read_pictures(self._pictures, unit)))


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


def load_encoder(settings: LatentsSettings, *, size: int, device: str) -> "tuple[EncodeImage, str]":
    """Load the autoencoder of a chain, and its fingerprint."""
    from pipelines.stages.encode_image import EncodeImage
    from udiff.bundle import load_autoencoder

    autoencoder = load_autoencoder(settings.autoencoder)
    encode = EncodeImage(
        autoencoder,
        device=device,
        size=size,
        batch_size=settings.batch_size,
        precision=settings.precision,
    )
    return encode, autoencoder.fingerprint()


def plan_latents(settings: LatentsSettings) -> Plan:
    """Check input and autoencoder, and begin a cache or go on with the one begun; needs no Ray.

    Raises:
        FileNotFoundError: there is no finished pictures cache at `input`, or no autoencoder.
        ValueError: `input` holds no pictures, or there is another cache at `output`.
    """
    pictures = open_folder(settings.input)
    manifest = read_manifest(pictures)
    if manifest.kind != "pictures":
        raise ValueError(f"{pictures} is a cache of {manifest.kind}: latents come from pictures")
    size = manifest.shapes["image"][0]
    encode, made_by = load_encoder(settings, size=size, device="cpu")
    plan = _plan(settings, pictures, manifest, made_by, encode.latent_shape())
    start_plan(open_folder(settings.output), plan)
    return plan


def make_latents(settings: LatentsSettings, plan: Plan) -> PrepareReport:
    """Make all units of a plan that are not there yet, on the running Ray.

    Raises:
        ValueError: too many workers, or nothing that could be cached.
        FailedUnitsError: some units could not be made.
    """
    pictures, output = open_folder(settings.input), open_folder(settings.output)
    manifest = read_manifest(pictures)
    if Path(settings.autoencoder).exists():  # actors have another working directory
        path = str(Path(settings.autoencoder).absolute())
        settings = settings.model_copy(update={"autoencoder": path})
    chain = partial(
        LatentsChain,
        size=manifest.shapes["image"][0],
        made_by=plan.identity["latent"]["autoencoder"],
    )
    write = WriteUnit(
        output,
        schema=latents_schema(plan.shapes["latent_mean"], image_shape=plan.shapes.get("image")),
        plan=plan.fingerprint,
        row_group_size=settings.row_group_size,
    )
    units = [Unit(Path(file.path).stem, file.path, file.rows) for file in manifest.files]
    return run_units(
        partial(chain, settings, pictures, write),
        units,
        folder=output,
        plan=plan,
        workers=Workers(settings.workers, cpus=settings.threads, gpus=settings.gpus),
    )


def _plan(
    settings: LatentsSettings,
    pictures: Folder,
    manifest: Manifest,
    made_by: str,
    latent_shape: tuple[int, ...],
) -> Plan:
    content = hashlib.sha256(pictures.read(MANIFEST) + pictures.read(PLAN)).hexdigest()
    latent = {"autoencoder": made_by, "dtype": _DTYPES[settings.precision]}
    image = {"image": manifest.shapes["image"]} if settings.keep_image else {}
    return Plan(
        kind="latents",
        identity={**manifest.identity, "latent": latent},
        options={
            "batch_size": settings.batch_size,
            "row_group_size": settings.row_group_size,
            "threads": settings.threads,
            "device": settings.device,
        },
        inputs={"pictures": content},
        shapes={"latent_mean": latent_shape, "latent_logvar": latent_shape} | image,
        class_names=manifest.class_names,
    )
