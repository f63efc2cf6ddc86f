"""Settings that every recipe is put together from: frozen, and closed to keys they do not know."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """A group of recipe keys; a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimizerSettings(Settings):
    """AdamW and its schedule, counted in steps of the whole global batch."""

    lr: float = Field(gt=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    final_lr_ratio: Fraction = 1.0
    """Learning rate at the end, as a fraction of `lr`, reached along a cosine; 1 keeps it constant."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient over all of the phase's parameters."""


class EmaSettings(Settings):
    """Moving average of the weights: decay min(decay, (1 + step) / (10 + step)) where warm-up is on."""

    decay: float = Field(gt=0, lt=1)
    warmup: bool = False


class TrainSettings(Settings):
    """How long and how a run trains; nothing here changes what is learned but batch and precision."""

    images: PositiveInt
    """Length of the run in training samples."""
    batch_size: PositiveInt
    """Global batch: all ranks and accumulated micro-batches together."""
    accumulate: PositiveInt = 1
    """Micro-batches into which a rank cuts its part of the batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    shard: Literal["root", "blocks"] = "blocks"
    """FSDP units: every block of the network by itself, or all as one (small models)."""
    compile: bool = False
    """Compile each block with `torch.compile`."""
    checkpoint_every: PositiveInt = 10_000
    """Steps between training checkpoints; there is always one before the first step and at the end."""
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10
    seed: int = Field(default=0, ge=0)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, self.images // self.batch_size)


class DataSettings(Settings):
    """Where the training samples are, and in which order they come."""

    cache: str | None = None
    """Folder or bucket URL of the cache that `jobs.prepare` wrote."""
    window_row_groups: PositiveInt = 4
    """Row groups that are shuffled together."""
    lanes: PositiveInt = 8
    """Places of the epoch that are read side by side; part of the sample order."""
    class_names: tuple[str, ...] = ()
    """Names of the labels in their order; taken from the cache where the recipe names none."""


class AutoencoderSettings(Settings):
    """Which autoencoder stands between pixels and latents, and how its latents are normalized."""

    path: str
    """Hub id, a local diffusers folder, or a bundle of an autoencoder family."""
    normalization: Literal["scale", "channels"] = "scale"
    """`scale`: the autoencoder's own scaling and shift. `channels`: the cache's mean and std of each
    channel."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean of raw latents; a run fills it in from `normalization`."""
    std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _statistics_go_together(self) -> "AutoencoderSettings":
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or neither")
        return self

    def relative_to(self, folder: Path) -> "AutoencoderSettings":
        """Resolve a relative path that exists below `folder` (an autoencoder inside a bundle)."""
        inside = folder / self.path
        return self.model_copy(update={"path": str(inside)}) if inside.exists() else self


class SamplingSettings(Settings):
    """What a request that leaves it open gets."""

    num_steps: PositiveInt = 250
    guidance_scale: float = Field(default=1.0, ge=0)
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Times (0 = noise, 1 = data) strictly between which guidance is on."""
    shift: float = Field(default=1.0, gt=0)
    """Above 1 spends more steps near noise."""
    last_step: float | None = Field(default=None, gt=0, lt=1)
    """Length of the last step in time; 1 / num_steps where it is left open."""
