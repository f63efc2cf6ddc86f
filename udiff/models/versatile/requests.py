"""What can be asked of a Versatile Diffusion system."""

import io
from typing import Annotated

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from udiff.models.versatile.schedule import NUM_TIMESTEPS
from udiff.requests import Picture
from udiff.settings import Fraction

Prompt = Annotated[str, Field(max_length=4000)]


class SampleRequest(BaseModel):
    """What every request can say; what is left open comes from the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_steps: Annotated[int, Field(ge=1, le=NUM_TIMESTEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    eta: Fraction | None = None


class FocusRequest(SampleRequest):
    """A picture to start from, and what is taken from it."""

    image: Picture
    focus: Fraction = 0.5
    """0 takes what is shown alone, 1 the style alone."""
    disentanglement: Annotated[int, Field(ge=-2, le=2)] = 0
    """The first release's focus, by numbers of components: -2, -1 remove style, 1, 2 keep it."""


class TextToImage(SampleRequest):
    """A picture of a text."""

    prompt: Prompt


class ImageVariation(FocusRequest):
    """A picture like another one."""

    fidelity: Fraction = 0.0
    """How much is taken from the picture itself: 0 begins from noise, 1 returns the picture."""
    adjust_colors: bool = True
    """Give the result the means and deviations of the picture's colors."""


class DualContext(FocusRequest):
    """A picture of a text and like a picture."""

    prompt: Prompt
    text_strength: Fraction = 0.5
    """Share of the text; the picture has the rest."""


class ImagePart(BaseModel):
    """One of several pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Picture
    mask: Picture | None = None
    """White is kept, black is removed."""
    weight: Fraction = 1.0
    focus: Fraction = 0.5


class MultiContext(SampleRequest):
    """A picture like several pictures, parts of them masked, and of a text."""

    images: Annotated[tuple[ImagePart, ...], Field(min_length=1, max_length=4)]
    prompt: Prompt = ""
    text_strength: Fraction = 0.0


class ImageTextImage(SampleRequest):
    """A picture changed by way of its caption."""

    image: Picture
    negative: Prompt = ""
    """What is taken out of the caption."""
    positive: Prompt = ""
    """What is added to it."""

    @model_validator(mode="after")
    def _check(self) -> "ImageTextImage":
        if not self.negative and not self.positive:
            raise ValueError("give negative, positive or both: what is to change")
        return self


class TextRequest(SampleRequest):
    """How a text is written."""

    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """Of the words; 0 takes the likeliest."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Likeliest tokens that are drawn from; 0 is all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    clean: bool = True
    """Remove words that are repeated at once."""


class ImageToText(TextRequest):
    """A text about a picture."""

    image: Picture


class TextVariation(TextRequest):
    """A text like another one."""

    prompt: Prompt


def example_picture() -> bytes:
    """Make a small picture, by which a task is tried out."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 120, 40)).save(file, "PNG")
    return file.getvalue()
