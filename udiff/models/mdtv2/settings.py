"""What an MDTv2 (or MDT) recipe can say of network, objective and sampling."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from udiff.settings import ExtraLossSettings, Fraction, ReuseSettings, Settings

NUM_TIMESTEPS = 1000


class NetworkSettings(Settings):
    """Version and sizes of the network."""

    version: Literal[1, 2] = 2
    """2 is MDTv2 (long skips, input shortcuts to the decoder), 1 is MDT."""
    dim: PositiveInt
    num_heads: PositiveInt
    depth: PositiveInt
    """Encoder and decoder blocks; the side interpolater is one more."""
    num_decoder_blocks: PositiveInt
    patch_size: PositiveInt = 2
    mlp_ratio: float = Field(default=4.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "NetworkSettings":
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(
                f"dim {self.dim} must be a multiple of num_heads ({self.num_heads}), and of 4 for "
                "positions in two dimensions"
            )
        encoder = self.depth - self.num_decoder_blocks
        if encoder <= 0 or (self.version == 2 and encoder % 2):
            raise ValueError(
                f"depth {self.depth} less num_decoder_blocks {self.num_decoder_blocks} is the "
                "encoder: at least 1, and in version 2 an even number (it is a U)"
            )
        return self


class ObjectiveSettings(ExtraLossSettings):
    """Learned-sigma DDPM on all tokens, and again on some of them."""

    variance: Literal["learned", "fixed"] = "learned"
    timesteps: Literal["uniform", "loss_second_moment"] = "uniform"
    snr_cap: float | None = Field(default=5.0, gt=0)
    """gamma of min-SNR-gamma; version 1 has no weights (null)."""
    mask_ratio: Fraction | None = 0.3
    """Smallest fraction of tokens that the masked pass drops; null trains without that pass."""
    mask_ratio_width: Fraction = 0.2
    """How much more a step may drop; version 1 has 0."""
    label_dropout_prob: Fraction = 0.1
    """0 trains without a null label: no guidance is possible then."""

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveSettings":
        if self.mask_ratio is not None and self.mask_ratio + self.mask_ratio_width >= 1:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} + mask_ratio_width {self.mask_ratio_width} must be "
                "below 1"
            )
        return self


class SamplingSettings(Settings):
    """What a request that leaves it open gets."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    num_steps: int = Field(default=250, ge=2, le=NUM_TIMESTEPS)
    eta: Fraction = 0.0
    """Of DDIM: 0 adds no noise, 1 as much as DDPM."""
    clip: float | None = Field(default=None, gt=0)
    """Largest magnitude of a data prediction; official latents are not clipped."""
    guidance_scale: float = Field(default=1.0, ge=0)
    guidance_power: float = Field(default=4.0, gt=0)
    guidance_channels: PositiveInt = 3
    """Official samples are guided in three of the four latent channels."""
    reuse: ReuseSettings | None = None
    """Runs the encoder only at some steps."""
