"""Requests for images and their answers, in the shape of OpenAI's `/v1/images/generations`."""

import base64
import difflib
import io
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from serve.errors import invalid, missing_task
from serve.records import ModelFacts, Order, TaskFacts
from serve.requests import MAX_OUTPUTS, MAX_SEED, check_model, given, seeds_of

TASKS = ("class_to_image", "text_to_image")


class ImagesRequest(BaseModel):
    """A request: OpenAI's keys, and `seed`, `steps` and `guidance_scale`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(min_length=1, max_length=4000)
    """A text; of models of classes, a class name or a label as text."""
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_OUTPUTS)
    size: str = "auto"
    """As `32x32`, or `auto` for the model's own."""
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


def plan_images(request: ImagesRequest, facts: ModelFacts) -> Order:
    """Turn a request into an order of this model.

    Raises:
        ApiError: 404 for another model or one that makes no pictures, 400 for a class or size that
            it does not know.
    """
    check_model(request.model, facts)
    task = next((name for name in TASKS if name in facts.tasks), None)
    if task is None:
        raise missing_task("pictures of a prompt", facts.tasks)
    wanted: dict[str, Any] = {"prompt": request.prompt}
    if task == "class_to_image":
        wanted = {"label": _find_label(request.prompt, facts)}
    wanted |= _size(request.size, facts.tasks[task])
    wanted |= given(num_steps=request.steps, guidance_scale=request.guidance_scale)
    return Order(task, tuple({**wanted, "seed": s} for s in seeds_of(request.seed, request.n)))


def write_images(
    images: Sequence[UInt8[np.ndarray, "height width 3"]], order: Order
) -> ImagesResponse:
    """Encode the pictures of an order as PNG; Python's own time, so it runs beside the loop."""
    height, width, _ = images[0].shape
    data = [
        GeneratedImage(b64_json=encode_png(image), seed=request["seed"])
        for image, request in zip(images, order.requests, strict=True)
    ]
    return ImagesResponse(created=int(time.time()), data=data, size=f"{width}x{height}")


def encode_png(image: UInt8[np.ndarray, "height width 3"]) -> str:
    """Write a picture as PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _size(size: str, task: TaskFacts) -> dict[str, int]:
    """Give the keys of a request that say a size; none for the model's own."""
    if size in ("auto", task.size):
        return {}
    width, times, height = size.partition("x")
    if not (task.takes("width") and task.takes("height")):
        raise invalid("size", f"must be {task.size!r} or 'auto', got {size!r}")
    if not (times and all(side.isascii() and side.isdecimal() for side in (width, height))):
        raise invalid("size", f"must look like {task.size!r}, or be 'auto', got {size!r}")
    return {"width": int(width), "height": int(height)}


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
    raise invalid("prompt", f"must be {allowed}, got {prompt!r}")
