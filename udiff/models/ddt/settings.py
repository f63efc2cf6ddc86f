"""What a DDT recipe can say of network, objective and sampling."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from udiff.settings import (
    ExtraLossSettings,
    Fraction,
    MaskedSettings,
    ReuseSettings,
    SamplingSettings,
    Settings,
)

StepName = Literal["ode", "sde_mean", "sde", "sde_preserve"]
WeightName = Literal["constant", "inverse_variance", "snr", "snr_at_least_5", "snr_at_most_5"]


class NetworkSettings(Settings):
    """Sizes of the network."""

    dim: PositiveInt
    num_heads: PositiveInt
    num_blocks: PositiveInt
    num_encoder_blocks: PositiveInt | None
    """Blocks of the condition encoder; the others are the velocity decoder. null is the undivided
    baseline, the improved DiT."""
    patch_size: PositiveInt = 2

    @model_validator(mode="after")
    def _check(self) -> "NetworkSettings":
        if self.dim % (4 * self.num_heads):
            raise ValueError(
                f"dim {self.dim} must be a multiple of 4 x num_heads ({self.num_heads}), for rotary"
                " positions in two dimensions"
            )
        if self.num_encoder_blocks is not None and self.num_encoder_blocks >= self.num_blocks:
            raise ValueError(
                f"num_encoder_blocks {self.num_encoder_blocks} must be below num_blocks "
                f"{self.num_blocks}: the rest is the velocity decoder"
            )
        return self


class LatentSettings(Settings):
    """Shape of the latents."""

    channels: PositiveInt = 4
    height: PositiveInt
    width: PositiveInt


class ObjectiveSettings(ExtraLossSettings):
    """Flow matching."""

    time: Literal["uniform", "logit_normal"] = "logit_normal"
    time_shift: PositiveFloat = 1.0
    """Moves training times as `sampling.shift` does the sampler's."""
    weight: WeightName = "constant"
    """Of the squared error; snr is alpha / sigma, which the published minsnr bounds from below and
    maxsnr from above."""
    label_dropout_prob: Fraction = 0.1
    masked: MaskedSettings | None = None
    """A second pass whose encoder sees only some tokens."""


class DDTSampling(SamplingSettings):
    """How to sample."""

    guidance_interval: tuple[Fraction, Fraction] | None = (0.0, 1.0)  # type: ignore[assignment]
    """Times strictly between which guidance is on; null is always, at time 0 too."""
    guidance_channels: tuple[int, int | None] = (0, None)
    """Channels that are guided: from the first number up to, without, the second (null: all)."""
    guidance_other_scale: float = 1.0
    """Guidance scale of the other channels."""
    solver: Literal["euler", "heun", "adams"] = "euler"
    order: int = Field(default=2, ge=1, le=4)
    """Of adams."""
    clock: Literal["time", "snr", "inverse_snr", "log_snr"] = "time"
    """In terms of what adams interpolates velocities."""
    is_exact: bool = False
    """Whether heun asks for the velocity at every corrected sample, at twice the cost."""
    step: StepName = "ode"
    """sde_preserve has half the diffusion of sde, sde_mean no noise."""
    last: StepName = "ode"
    """The step to the data."""
    diffusion: Literal["linear", "constant"] = "linear"
    """w of the SDE: 1 - t, or 1."""
    reuse: ReuseSettings | None = None
    """Runs the encoder only at some steps."""

    @model_validator(mode="after")
    def _check(self) -> "DDTSampling":
        if self.solver == "adams" and (self.step, self.last) != ("ode", "ode"):
            raise ValueError(f"solver adams takes ODE steps only, got step {self.step}")
        return self
