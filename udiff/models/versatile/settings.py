"""What a Versatile Diffusion recipe can say of network, objective and sampling."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from udiff.models.versatile.flows import FLOWS
from udiff.models.versatile.layers import Heads
from udiff.models.versatile.network import ContextLayers, ImageLayers, TextLayers
from udiff.models.versatile.plan import Level, Plan
from udiff.models.versatile.schedule import BETAS, NUM_TIMESTEPS, Spacing
from udiff.settings import Fraction, Settings

FlowName = Literal["text_to_image", "image_variation", "image_to_text", "text_variation"]
ALL_FLOWS: tuple[FlowName, ...] = (
    "text_to_image", "image_variation", "image_to_text", "text_variation",
)  # fmt: skip
Kind = Literal["image", "text"]


class NetworkSettings(Settings):
    """Sizes of the U-Nets; levels go from fine to coarse, and are those of all modalities."""

    channels: PositiveInt = 320
    multipliers: tuple[PositiveInt, ...] = (1, 2, 4, 4)
    """Channels of each level over `channels`."""
    num_blocks: tuple[PositiveInt, ...] = (2, 2, 2, 2)
    has_context: tuple[bool, ...] = (True, True, True, False)
    """Levels that have context blocks; the middle always has one."""
    num_heads: PositiveInt | None = 8
    head_dim: PositiveInt | None = None
    """Width of a head; of `num_heads` and this, one is null."""
    context_dim: PositiveInt = 768
    """Width of a context's tokens."""
    text_positions: PositiveInt = 4
    """Positions into which a text's features are folded."""
    dropout: Fraction = 0.0

    @model_validator(mode="after")
    def _check(self) -> "NetworkSettings":
        if (self.num_heads is None) == (self.head_dim is None):
            raise ValueError("give one of num_heads and head_dim, and null for the other")
        lengths = {len(self.multipliers), len(self.num_blocks), len(self.has_context)}
        if len(lengths) > 1:
            raise ValueError(
                f"multipliers, num_blocks and has_context need a value for each level, got "
                f"{len(self.multipliers)}, {len(self.num_blocks)} and {len(self.has_context)}"
            )
        for multiplier in self.multipliers:
            if self.channels * multiplier % 32:
                raise ValueError(f"channels {self.channels} x {multiplier} must be divisible by 32")
            Heads(self.num_heads, self.head_dim).count(self.channels * multiplier)
        return self

    @property
    def plan(self) -> Plan:
        """The order of blocks."""
        levels = zip(self.multipliers, self.num_blocks, self.has_context, strict=True)
        return Plan(self.channels, tuple(Level(m * self.channels, n, a) for m, n, a in levels))

    def context_layers(self) -> ContextLayers:
        """Describe the context blocks of any kind."""
        return ContextLayers(self.context_dim, Heads(self.num_heads, self.head_dim), self.dropout)

    def image_layers(self, channels: int) -> ImageLayers:
        """Describe the data blocks of images."""
        return ImageLayers(channels, channels, self.dropout)

    def text_layers(self, features: int) -> TextLayers:
        """Describe the data blocks of texts."""
        return TextLayers(features, features, self.text_positions, self.dropout)


class LatentSettings(Settings):
    """Shape of the latents of pictures."""

    channels: PositiveInt = 4
    height: PositiveInt
    width: PositiveInt


class LayerScale(Settings):
    """How one group of layers learns."""

    lr: NonNegativeFloat = 1.0
    """Factor of the learning rate."""
    gradient: NonNegativeFloat = 1.0
    """Factor of the gradient, before it is clipped."""


class LayerScales(Settings):
    """How each group of layers learns: the time layers, and both parts of each modality."""

    time: LayerScale = LayerScale()
    image_data: LayerScale = LayerScale()
    image_context: LayerScale = LayerScale()
    text_data: LayerScale = LayerScale()
    text_context: LayerScale = LayerScale()


class ObjectiveSettings(Settings):
    """DDPM's noise prediction, flow by flow."""

    betas: tuple[float, float] = BETAS
    """First and last noise variance; their square roots rise linearly."""
    context_dropout_prob: Fraction = 0.1
    """How often a context is replaced by the unconditional one."""
    error: Literal["l2", "l1"] = "l2"
    flows_per_step: PositiveInt | None = None
    """Different flows, drawn anew, whose gradients a step adds up; null takes all."""
    weights: dict[FlowName, NonNegativeFloat] = Field(default_factory=dict)
    """Of flows whose loss has another weight than 1."""
    scales: LayerScales = LayerScales()


class SamplingSettings(Settings):
    """What a request that leaves it open gets."""

    num_steps: int = Field(default=50, ge=1, le=NUM_TIMESTEPS)
    spacing: Spacing = "uniform"
    eta: Fraction = 0.0
    """0 adds no noise, 1 as much as DDPM."""
    guidance_scale: float = Field(default=7.5, ge=0)
    null_contexts: Literal["zeros", "gray", "near_black"] = "zeros"
    """What pictures that guidance leads away from are: nothing at all, and black where text is
    written (published demo); mid-gray (first release); almost black (diffusers)."""
    text_temperature: float = Field(default=1.0, gt=0)


def check_flows(flows: tuple[FlowName, ...]) -> None:
    """Refuse flows that are named twice, and none.

    Raises:
        ValueError: they are not different flows.
    """
    if not flows or len(set(flows)) != len(flows):
        raise ValueError(f"flows must be different ones of {', '.join(FLOWS)}, got {flows}")
