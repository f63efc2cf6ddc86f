"""Settings that every recipe is put together from: frozen, and closed to keys they do not know."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """A group of recipe keys; a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ScheduledSettings(Settings):
    """What all optimizers have, and their schedule, counted in steps of the whole global batch."""

    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly."""
    warmup_start: Literal[0, 1] = 1
    """The first step has this many of `warmup_steps` parts of the rate."""
    final_lr_ratio: Fraction = 1.0
    """Learning rate at the end over `lr`, reached along a cosine; 1 keeps it constant."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient over all of the phase's parameters."""


class AdamWSettings(ScheduledSettings):
    """AdamW (arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)


class AdanSettings(ScheduledSettings):
    """Adan (arXiv 2208.06677); its betas are 1 minus the paper's."""

    name: Literal["adan"]
    betas: tuple[Fraction, Fraction, Fraction] = (0.98, 0.92, 0.99)
    proximal: bool = True
    """Decay by a division after the step, as in the paper, or by a product before it as AdamW."""


def _optimizer_name(value: Any) -> Any:
    return value.get("name", "adamw") if isinstance(value, dict) else getattr(value, "name", None)


OptimizerSettings = Annotated[
    Annotated[AdamWSettings, Tag("adamw")] | Annotated[AdanSettings, Tag("adan")],
    Discriminator(
        _optimizer_name,
        custom_error_type="optimizer_name",
        custom_error_message="name must be adamw or adan",
    ),
]
"""Chosen by `name`; AdamW where it is left open."""


class EmaSettings(Settings):
    """Moving average of the weights; with warm-up by min(decay, (1 + step) / (10 + step))."""

    decay: float = Field(gt=0, lt=1)
    warmup: bool = False
    first_step: int = Field(default=0, ge=0)
    """Number of the step, counted from 1, that is the first to be averaged in; until then the
    average is the weights themselves."""


class TrainSettings(Settings):
    """How long and how a run trains; only batch and precision change what is learned."""

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
    activation_checkpointing: bool = False
    """Keep each block's input alone, and compute it anew in the backward pass."""
    checkpoint_every: PositiveInt = 10_000
    """Steps between training checkpoints; one is always made at the start and at the end."""
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
    flip: bool = False
    """Exchange left and right of every other sample, by chance: takes the columns that
    `jobs.prepare latents --flip` made, and mirrors pictures."""
    class_names: tuple[str, ...] = ()
    """Names of the labels in their order; taken from the cache where the recipe names none."""


class EncoderSettings(Settings):
    """A frozen network that a recipe names; bundles carry a copy of a small local one."""

    path: str
    """Hub id or local folder."""

    def relative_to(self, folder: Path) -> Self:
        """Resolve a relative path that exists below `folder` (an encoder inside a bundle)."""
        inside = folder / self.path
        return self.model_copy(update={"path": str(inside)}) if inside.exists() else self


class T5Settings(EncoderSettings):
    """The encoder half of a T5 (arXiv 1910.10683), with its tokenizer."""

    path: str
    """Local folder of transformers or of a diffusers pipeline, hub id, or `<hub id>/<subfolder>`
    of a pipeline."""
    pad: Literal["end", "pad"] = "pad"
    """Token that fills short texts up: a further end token, or T5's own. Neither is masked."""
    precision: Literal["fp32", "bf16", "stored"] = "fp32"
    """Of the weights and the computation, `stored` as in their file; states are float32."""


class AutoencoderSettings(EncoderSettings):
    """Which autoencoder stands between pixels and latents, and how its latents are normalized."""

    path: str
    """Hub id, local diffusers folder, bundle of an autoencoder family, or official checkpoint
    of the LDM layout (a file, or `<hub id>/<file>`)."""
    normalization: Literal["scale", "channels"] = "scale"
    """`scale`: the autoencoder's own scaling and shift. `channels`: mean and std of each channel
    in the cache."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean of raw latents; a run fills it in from `normalization`."""
    std: tuple[float, ...] | None = None
    multiplier: float = Field(default=1.0, gt=0)
    """Normalized latents are multiplied by this."""
    sliced: bool = False
    """Decode one picture at a time: less memory, same pictures."""
    tile: PositiveInt | None = None
    """Side in pixels of the overlapping squares in which larger pictures are decoded: memory for
    one square, at the price of slight differences between squares."""

    @model_validator(mode="after")
    def _statistics_go_together(self) -> "AutoencoderSettings":
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both or neither")
        return self

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and std that normalize a latent, `multiplier` included; 0 and 1 if unknown.

        Raises:
            ValueError: there are statistics of another number of channels.
        """
        mean, std = self.mean or (0.0,) * channels, self.std or (1.0,) * channels
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"autoencoder.mean and .std need latent.channels = {channels} values, got "
                f"{len(mean)} and {len(std)}"
            )
        return mean, tuple(value / self.multiplier for value in std)


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

    @model_validator(mode="after")
    def _interval_has_an_order(self) -> Self:
        if self.guidance_interval and self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(
                "guidance_interval must go from a lower time to a higher one, got "
                f"{self.guidance_interval}"
            )
        return self


# ---------------------------------------------------------------- pieces for any family


class AlignmentSettings(Settings):
    """REPA (arXiv 2410.06940): tokens of a block learn to resemble those of a vision encoder."""

    layer: PositiveInt = 8
    """Number of the block, counted from 1, whose output is aligned."""
    weight: float = Field(default=0.5, gt=0)
    hidden_dim: PositiveInt | None = None
    """Width of the projector; the network's where left open."""
    feature_dim: PositiveInt = 768
    """Width of the vision encoder's tokens."""
    teacher: str | None = None
    """timm name of the vision encoder, which then reads the batch's `image`, or a local safetensors
    file of its weights; null takes the cache's column `dino_feature`."""


class DispersiveSettings(Settings):
    """Dispersive loss (arXiv 2506.09027): a batch's samples keep apart inside the network."""

    layer: PositiveInt = 8
    """Number of the block, counted from 1."""
    weight: float = Field(default=0.5, gt=0)
    temperature: float = Field(default=1.0, gt=0)


class DirectionSettings(Settings):
    """1 - cosine of predicted and true velocity (arXiv 2501.01423, section 4.2)."""

    weight: float = Field(default=1.0, gt=0)


class MaskedSettings(Settings):
    """A second pass whose encoder sees only some of the tokens (MDT, arXiv 2303.14389)."""

    ratio: Fraction = 0.3
    """Smallest fraction of tokens that the pass drops."""
    ratio_width: Fraction = 0.2
    """How much more a step may drop."""

    @model_validator(mode="after")
    def _some_stay(self) -> "MaskedSettings":
        if self.ratio + self.ratio_width >= 1:
            raise ValueError(f"ratio {self.ratio} + ratio_width {self.ratio_width} must be below 1")
        return self


class ExtraLossSettings(Settings):
    """Losses that can be put around any family's objective."""

    alignment: AlignmentSettings | None = None
    dispersive: DispersiveSettings | None = None
    direction: DirectionSettings | None = None

    @model_validator(mode="after")
    def _one_layer(self) -> "ExtraLossSettings":
        layers = {extra.layer for extra in (self.alignment, self.dispersive) if extra}
        if len(layers) > 1:
            raise ValueError(f"alignment.layer and dispersive.layer must be the same, got {layers}")
        return self

    def check_layers(self, num_blocks: int) -> None:
        """Refuse losses at blocks that a network does not have.

        Raises:
            ValueError: there is one.
        """
        for name, extra in (("alignment", self.alignment), ("dispersive", self.dispersive)):
            if extra and extra.layer > num_blocks:
                raise ValueError(
                    f"objective.{name}.layer must be one of the network's {num_blocks} blocks, "
                    f"got {extra.layer}"
                )


def check_patches(height: int, width: int, *, patch_size: int) -> None:
    """Refuse latents that are no whole number of patches.

    Raises:
        ValueError: a side is not a multiple of the patch.
    """
    for name, side in (("height", height), ("width", width)):
        if side % patch_size:
            raise ValueError(
                f"latent.{name} {side} must be a multiple of network.patch_size {patch_size}"
            )


class SquareLatentSettings(Settings):
    """Shape of the latents, of networks whose positions are those of a square."""

    channels: PositiveInt
    height: PositiveInt
    width: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> "SquareLatentSettings":
        if self.height != self.width:
            raise ValueError(f"latents must be square, got {self.height} x {self.width}")
        return self


class ReuseSettings(Settings):
    """Reuse of the encoder's state between sampling steps (arXiv 2504.05741)."""

    every: PositiveInt
    """Steps for each run of the encoder."""
    choice: Literal["fixed", "dynamic"] = "fixed"
    """`fixed`: the encoder runs at every so-manieth step. `dynamic`: it runs as often, at the steps
    which a dynamic program over a template batch finds best."""
