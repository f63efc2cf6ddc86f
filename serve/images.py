"""Requests for images and their answers, in the shape of OpenAI's `/v1/images/generations`."""

import base64
import difflib
import io
import secrets
import time
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from serve.errors import ApiError
from serve.records import ModelFacts, Order

MAX_PICTURES = 10
MAX_SEED = 2**53 - MAX_PICTURES
"""Such that every picture's seed survives every JSON parser."""


class ImagesRequest(BaseModel):
    """A request: OpenAI's keys, and `seed`, `steps` and `guidance_scale`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(min_length=1, max_length=256)
    """A class name, or a label as text."""
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_PICTURES)
    size: str = "auto"
    """The model's own, as `32x32`, or `auto`."""
    response_format: Literal["b64_json"] = "b64_json"
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """Picture i is sampled with seed + i. Where left open it is drawn at random."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: float | None = Field(default=None, ge=0, le=100)


class GeneratedImage(BaseModel):
    """One picture of an answer."""

    b64_json: str
    seed: int
    """Asking for one picture with this seed gives this picture again."""


class ImagesResponse(BaseModel):
    """The answer to a request."""

    created: int
    data: list[GeneratedImage]
    output_format: Literal["png"] = "png"
    size: str


def plan(request: ImagesRequest, facts: ModelFacts) -> Order:
    """Turn a request into an order of this model.

    Raises:
        ApiError: 404 for another model, 400 for a class or size that it does not know.
    """
    if request.model not in (None, facts.name):
        raise ApiError(
            404,
            f"The model {request.model!r} does not exist; this server has {facts.name!r}.",
            param="model",
            code="model_not_found",
        )
    if request.size not in ("auto", facts.size):
        raise _invalid("size", f"must be {facts.size!r} or 'auto', got {request.size!r}")
    return Order(
        label=_find_label(request.prompt, facts),
        seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
        num_pictures=request.n,
        num_steps=request.steps,
        guidance_scale=request.guidance_scale,
    )


def write_response(
    images: UInt8[np.ndarray, "pictures height width 3"], order: Order
) -> ImagesResponse:
    """Encode the pictures of an order as PNG; Python's own time, so it runs beside the loop."""
    _, height, width, _ = images.shape
    data = [
        GeneratedImage(b64_json=_encode_png(image), seed=order.seed + index)
        for index, image in enumerate(images)
    ]
    return ImagesResponse(created=int(time.time()), data=data, size=f"{width}x{height}")


def _find_label(prompt: str, facts: ModelFacts) -> int:
    """Look a class up by its name (letter case aside), else by its number."""
    name = prompt.strip()
    labels = {known.casefold(): label for label, known in enumerate(facts.class_names)}
    if name in facts.class_names:
        return facts.class_names.index(name)
    if name.casefold() in labels:
        return labels[name.casefold()]
    if name.isascii() and name.isdecimal() and int(name) < facts.num_classes:
        return int(name)
    allowed = f"a label from 0 to {facts.num_classes - 1}"
    if facts.class_names:
        close = difflib.get_close_matches(name, facts.class_names, n=3, cutoff=0)
        allowed = f"a class name (as {', '.join(map(repr, close))}) or {allowed}"
    raise _invalid("prompt", f"must be {allowed}, got {prompt!r}")


def _encode_png(image: UInt8[np.ndarray, "height width 3"]) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _invalid(param: str, problem: str) -> ApiError:
    return ApiError(400, f"{param} {problem}", param=param, code="invalid_value")
