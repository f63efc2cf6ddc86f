"""What Dual Diffusion can be asked; what a request leaves open comes from the recipe."""

from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from udiff.requests import Picture

Seed = Annotated[int, Field(ge=0, lt=2**63)]
NumSteps = Annotated[int, Field(ge=1, le=1000)]
Text = Annotated[str, Field(max_length=10_000)]
Side = Annotated[int, Field(ge=1, le=4096)]


class TextToImage(BaseModel):
    """A picture of a text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Text
    negative_prompt: Text = ""
    """What guidance leads away from."""
    seed: Seed = 0
    num_steps: NumSteps | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    width: Side | None = None
    height: Side | None = None
    """In pixels; the recipe's size where left open."""
    sigmas: (
        Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1, max_length=1000)]
        | None
    ) = None
    """Noise levels of the steps, before the shift; they count in place of `num_steps`."""
    mu: Annotated[float, Field(ge=-10, le=10)] | None = None
    """Logarithm of a dynamic shift."""

    @field_validator("sigmas")
    @classmethod
    def _fall(cls, sigmas: list[float] | None) -> list[float] | None:
        if sigmas and any(later >= earlier for earlier, later in pairwise(sigmas)):
            raise ValueError("noise levels must fall from step to step")
        return sigmas


class ImageToText(BaseModel):
    """A caption of a picture, or what a template lacks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Picture
    seed: Seed = 0
    num_steps: NumSteps | None = None
    num_tokens: Annotated[int, Field(ge=2, le=4096)] | None = None
    """Length of the text, its padding included."""
    template: Text | None = None
    """A text in which every mask token (T5's `<extra_id_0>`) is one token to be found."""


class VisualQuestion(BaseModel):
    """The answer to a question about a picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Picture
    question: Text
    seed: Seed = 0
    num_steps: NumSteps | None = None
    num_tokens: Annotated[int, Field(ge=2, le=4096)] | None = None
    """Length of question and answer, padding included."""
