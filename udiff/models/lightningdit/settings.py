"""What a LightningDiT recipe can say of network, objective and sampling."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from udiff.settings import (
    DirectionSettings,
    ExtraLossSettings,
    Fraction,
    MaskedSettings,
    ReuseSettings,
    SamplingSettings,
    Settings,
)

PathName = Literal["linear", "gvp", "vp"]
PredictionName = Literal["velocity", "noise", "data", "score"]
WeightName = Literal["none", "velocity", "likelihood"]
Method = Literal["euler", "heun", "midpoint", "heun3", "rk4", "dopri5", "sde_euler", "sde_heun"]
DiffusionName = Literal["path", "sigma", "linear", "decreasing", "middle", "constant"]
LastStepName = Literal["mean", "ode", "tweedie", "none"]


class NetworkSettings(Settings):
    """Sizes and layers of the network; the layers of the released models where left open."""

    dim: PositiveInt
    num_heads: PositiveInt
    depth: PositiveInt
    patch_size: PositiveInt
    mlp_ratio: PositiveFloat = 4.0
    norm: Literal["rms", "layer"] = "rms"
    qk_norm: bool = False
    """Normalize queries and keys; the authors' advice against NaN losses in long runs."""
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"
    rotary: bool = True
    shift: bool = True
    """Whether the blocks' modulation shifts, beside scaling."""
    learn_sigma: bool = False
    num_encoder_blocks: int = Field(default=0, ge=0)
    """First blocks, whose change to the tokens can be reused between sampling steps, and which
    masked training shows only some tokens."""

    @model_validator(mode="after")
    def _check(self) -> "NetworkSettings":
        if self.dim % 4 or self.dim % self.num_heads:
            raise ValueError(
                f"dim {self.dim} must be a multiple of 4 and of num_heads {self.num_heads}"
            )
        if self.rotary and self.dim % (4 * self.num_heads):
            raise ValueError(
                f"dim {self.dim} must be a multiple of 4 x num_heads ({self.num_heads}), for rotary"
                " positions in two dimensions"
            )
        if self.num_encoder_blocks >= self.depth:
            raise ValueError(
                f"num_encoder_blocks {self.num_encoder_blocks} must be below depth {self.depth}"
            )
        return self


class ObjectiveSettings(ExtraLossSettings):
    """Path, prediction, times and losses."""

    path: PathName = "linear"
    prediction: PredictionName = "velocity"
    weight: WeightName = "none"
    """Of the squared error of noise or score; `velocity` and `likelihood` as in SiT."""
    time: Literal["uniform", "logit_normal"] = "logit_normal"
    time_mean: float = 0.0
    """Of the normal behind `logit_normal`; above 0 is towards data."""
    time_range: tuple[Fraction, Fraction] | None = None
    """Times of those batches that are restricted."""
    time_range_prob: Fraction = 1.0
    """How many batches that are."""
    direction: DirectionSettings | None = DirectionSettings()
    masked: MaskedSettings | None = None
    """A second pass whose first `network.num_encoder_blocks` see only some tokens."""
    label_dropout_prob: Fraction = 0.1
    """0 gives a network without null label, which can't be guided."""
    eps: float | None = Field(default=None, ge=0, lt=0.5)
    """Distance of times from ends at which the path is singular; as published where left open."""

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveSettings":
        if self.weight != "none" and self.prediction not in ("noise", "score"):
            raise ValueError(
                f"weight {self.weight} is for noise and score predictions; {self.prediction} takes "
                "none"
            )
        return self


class TransportSampling(SamplingSettings):
    """How to sample; `last_step` is the SDE's final step, 0.04 where left open."""

    method: Method = "euler"
    """rk4 is the 3/8 rule; dopri5 chooses its steps, and takes no heed of num_steps and shift."""
    guidance_channels: PositiveInt | None = 3
    """How many channels, the first, are guided; none given: all. The released models' scales are
    made for 3."""
    atol: PositiveFloat = 1e-6
    """Absolute error that dopri5 allows a step."""
    rtol: PositiveFloat = 1e-3
    diffusion: DiffusionName = "sigma"
    """Form of the SDE's w(t); `path` is SBDM, `middle` is increasing-decreasing."""
    diffusion_norm: PositiveFloat = 1.0
    last: LastStepName = "mean"
    """The SDE's final step, without noise."""
    eps: float | None = Field(default=None, ge=0, lt=0.5)
    """As `objective.eps`, for sampling."""
    reuse: ReuseSettings | None = None
    """Runs the first `network.num_encoder_blocks` only at some steps."""
