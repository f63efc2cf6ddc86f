"""What a Dual Diffusion recipe can say, part by part."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from udiff.settings import Fraction, Settings


class NetworkSettings(Settings):
    """Sizes of the transformer; the published one's where left open."""

    depth: PositiveInt = 24
    num_heads: PositiveInt = 24
    head_dim: PositiveInt = 64
    patch_size: PositiveInt = 2
    text_dim: PositiveInt = 4096
    """Width of the text encoder's states."""
    vocab_size: PositiveInt = 32_100
    """Tokens of the text encoder's tokenizer."""
    base_size: PositiveInt = 128
    """Latent elements along a side over which positions are as far apart as in SD3."""
    max_size: PositiveInt = 192
    """Most tokens along a side of a latent."""


class LatentSettings(Settings):
    """Shape of the latents."""

    channels: PositiveInt = 16
    height: PositiveInt | None = 64
    width: PositiveInt | None = 64
    """null takes latents of any size, as caches of several aspect ratios hold them."""
    downscale: PositiveInt = 8
    """Pixels along a side of a latent element."""
    side: PositiveInt = 64
    """Where height and width are left open: of pictures that are read, and of those whose request
    says no size."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> "LatentSettings":
        if (self.height is None) != (self.width is None):
            raise ValueError(
                f"height {self.height} and width {self.width} go together: give both or neither"
            )
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of pictures that nothing else is said of."""
        return self.height or self.side, self.width or self.side


class TextSettings(Settings):
    """Texts as tokens."""

    max_tokens: int = Field(default=256, ge=2)
    """Of prompts, captions, and questions with their answers."""
    mask_id: int = Field(default=32_099, ge=0)
    """Token that stands for a masked one; T5's `<extra_id_0>`."""
    end_id: int = Field(default=1, ge=0)


class LoraSettings(Settings):
    """Low-rank adapters (arXiv 2106.09685), by PEFT: the transformer itself stays as it is."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 16
    targets: tuple[str, ...] = (
        "to_q", "to_k", "to_v", "to_out.0",
        "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    """Ends of the names of the linear layers that get one."""


class ImageLossSettings(Settings):
    """Flow matching of latents."""

    weight: float = Field(default=1.0, ge=0)
    """0 leaves it out, and its part of the batch too."""
    text_dropout_prob: Fraction = 0.1
    states: Literal["online", "cached"] = "online"
    """Of captions: found by the text encoder at every step from the column `caption_tokens`, or
    read from the column `caption` (equal only where that keeps the states of padding too)."""
    recaption_prob: Fraction = 0.0
    """How often a sample's second caption (`recaption_tokens`) takes the place of its first."""
    gradient: Literal["plain", "unit"] = "plain"
    """Of the velocity: as it is, or scaled to length 1, so that `weight` does not count."""


class TextLossSettings(Settings):
    """Masked diffusion of tokens."""

    weight: float = Field(default=0.2, ge=0)
    """0 leaves it out, and its part of the batch too."""
    source: Literal["caption", "conversation"] = "caption"
    """Captions, all of whose tokens are learned (`caption_tokens`), or conversations, of which the
    answers are (`conversation_tokens`, `conversation_learned`)."""
    is_antithetic: bool = True
    """Spread a batch's times evenly; otherwise they are independent."""
    times: Literal["uniform", "importance"] = "uniform"
    """Where times lie: evenly in the mask's chance, or in its logarithm."""
    padding: Literal["learned", "ignored"] = "learned"
    """Whether the end tokens that fill a text up are learned."""


class ObjectiveSettings(Settings):
    """The sum of both losses, each on a part of the batch of its own."""

    image: ImageLossSettings = ImageLossSettings()
    text: TextLossSettings = TextLossSettings()
    learned: tuple[str, ...] = ()
    """Parameters that learn, by the start of their names (`mask_row`, `denoiser.text_proj_out`);
    with none named, all of the transformer does, and the mask's row does not."""


class ImageSampling(Settings):
    """Pictures from texts."""

    num_steps: PositiveInt = 28
    guidance_scale: float = Field(default=7.0, ge=0)
    """At most 1 is no guidance."""
    shift: PositiveFloat = 3.0
    """Above 1 spends more steps near noise; made twice at the low end, as officially."""
    is_dynamic: bool = False
    """Shift by the size of the picture, in place of `shift`."""
    max_shift: PositiveFloat = 1.15
    """Logarithm of the dynamic shift of 4096 tokens; of 256 it is 0.5."""


class TextSampling(Settings):
    """Texts from pictures."""

    caption_steps: PositiveInt = 128
    answer_steps: PositiveInt = 32
    method: Literal["cached", "plain"] = "cached"
    """Ask the network only when the text has changed since, or at every step."""


class DualSampling(Settings):
    """What requests that leave it open get."""

    image: ImageSampling = ImageSampling()
    text: TextSampling = TextSampling()
