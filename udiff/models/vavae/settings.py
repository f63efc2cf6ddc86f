"""What a recipe of an autoencoder can say of its network and its losses."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from udiff.autoencoders.ldm import LDMArchitecture
from udiff.settings import Fraction, Settings


class NetworkSettings(Settings):
    """Sizes of the autoencoder; each level but the first halves the resolution."""

    width: PositiveInt = 128
    """Channels of the first convolution."""
    multipliers: tuple[PositiveInt, ...] = Field(default=(1, 1, 2, 2, 4), min_length=1)
    """Channels of each level, as multiples of `width`."""
    blocks_per_level: PositiveInt = 2
    latent_channels: PositiveInt = 32
    hidden_channels: PositiveInt | None = None
    """Channels before the last layer of the encoder, as means; as the latent's where left open."""
    encoder_attention: tuple[NonNegativeInt, ...] = (4,)
    """Levels, counted from 0, whose blocks are followed by attention."""
    decoder_attention: tuple[NonNegativeInt, ...] = (4,)
    norm_groups: PositiveInt = 32
    dropout: Fraction = 0.0

    @model_validator(mode="after")
    def _check(self) -> "NetworkSettings":
        if self.width % self.norm_groups:
            raise ValueError(
                f"width {self.width} must be a multiple of norm_groups {self.norm_groups}"
            )
        levels = len(self.multipliers)
        beyond = [n for n in (*self.encoder_attention, *self.decoder_attention) if n >= levels]
        if beyond:
            raise ValueError(f"attention levels must be below {levels}, got {beyond}")
        return self

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent element."""
        return 2 ** (len(self.multipliers) - 1)

    def architecture(self) -> LDMArchitecture:
        """Fill in what is left open."""
        keys = self.model_dump()
        keys["hidden_channels"] = self.hidden_channels or self.latent_channels
        return LDMArchitecture(**keys)


class AdversarialSettings(Settings):
    """A PatchGAN and when it counts."""

    loss: Literal["hinge", "vanilla"] = "hinge"
    weight: float = Field(default=1.0, ge=0)
    """Of the autoencoder's part, times the ratio of the gradients at the decoder's last layer."""
    factor: float = Field(default=1.0, gt=0)
    """Of both parts."""
    generator_start: NonNegativeInt = 0
    """First step at which the autoencoder heeds the discriminator. The published `disc_start`
    counts the steps of both optimizers: `official_config.adversarial_starts`."""
    discriminator_start: NonNegativeInt = 0
    """First step at which the discriminator learns."""
    width: PositiveInt = 64
    num_layers: PositiveInt = 3


class FoundationSettings(Settings):
    """A foundation model and how latents are aligned to it."""

    model: Literal["dinov2", "mae", "vgg", "cache"] = "dinov2"
    """`vgg`: relu3_3 of `objective.perceptual_path`, for small pictures. `cache`: the column
    `dino_feature` that was computed beforehand."""
    path: str | None = None
    """timm name of another size, or a local file of weights."""
    normalize: bool = False
    """Shift and scale pixels as the model expects; the released autoencoders did without."""
    feature_dim: PositiveInt = 1024
    projects: Literal["latent", "feature"] = "latent"
    """Which of the two a 1 x 1 convolution brings to the other's width (`latent` without bias)."""
    train_projection: bool = True
    weight: float = Field(default=100.0, ge=0)
    adaptive: bool = False
    """Multiply the weight by the ratio of the gradients at the encoder's last layer."""
    distance_margin: float = Field(default=0.0, ge=0)
    cosine_margin: float = Field(default=0.0, ge=0)
    distance_weight: float = Field(default=1.0, ge=0)
    cosine_weight: float = Field(default=1.0, ge=0)


class ObjectiveSettings(Settings):
    """The losses, those that may be left out null."""

    kl_weight: float = Field(default=1e-6, ge=0)
    perceptual_weight: float = Field(default=1.0, ge=0)
    """0 does without LPIPS, whose network is most of a small autoencoder's work."""
    perceptual_path: str | None = None
    """File of LPIPS weights; null takes VGG16 of torchvision and the heads of the package lpips."""
    reduction: Literal["sum", "mean"] = "sum"
    """`sum` over a picture's pixels and its latent, as published; `mean` is `pp_style` there."""
    logvar: float = 0.0
    """Log variance of the pixels, with `reduction: sum`."""
    adversarial: AdversarialSettings | None = None
    alignment: FoundationSettings | None = None
