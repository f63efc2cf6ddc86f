"""Text about a picture or a text, in the shape of OpenAI's `/v1/chat/completions`.

The last message is what is asked: a picture alone is captioned, a picture with a text is a question
about it, a text alone is varied. Models without a memory of a conversation refuse earlier messages.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serve.errors import invalid, missing_task
from serve.records import ModelFacts, Order
from serve.requests import MAX_OUTPUTS, MAX_SEED, check_model, given, seeds_of


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Part):
    """Text of a message."""

    type: Literal["text"]
    text: str = Field(min_length=1, max_length=4000)


class ImageUrl(_Part):
    """Where a picture is: in the request itself."""

    url: str = Field(pattern=r"^data:image/[a-z+.-]+;base64,")
    """A data URI; the server fetches nothing."""
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Part):
    """Picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Part):
    """What the user says."""

    role: Literal["user"]
    content: Annotated[list[Part], BeforeValidator(_as_parts), Field(min_length=1)]
    """A text, or parts that are texts and pictures."""


class ChatRequest(BaseModel):
    """A request: OpenAI's keys that a diffusion model has a use for, and `steps`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    messages: list[Message] = Field(min_length=1, max_length=1)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_OUTPUTS)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """Choice i is sampled with seed + i. Where left open it is drawn at random."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: float | None = Field(default=None, ge=0, le=100)


class Answer(BaseModel):
    """A message of the model."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    finish_reason: Literal["stop"] = "stop"
    seed: int


class ChatResponse(BaseModel):
    """The answers to a request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]


def plan_chat(request: ChatRequest, facts: ModelFacts) -> Order:
    """Turn a request into an order of this model.

    Raises:
        ApiError: 404 for another model or one that can't answer this, 400 for a bad value.
    """
    check_model(request.model, facts)
    text, picture = _read(request.messages[-1])
    name, wanted = _task(text, picture)
    if name not in facts.tasks:
        raise missing_task(f"text of this kind ({name})", facts.tasks)
    wanted |= given(
        num_steps=request.steps,
        guidance_scale=request.guidance_scale,
        temperature=request.temperature,
        top_p=request.top_p,
    )
    for key in wanted:
        if not facts.tasks[name].takes(key):
            raise invalid(key, f"is not a parameter of the task {name}")
    return Order(name, tuple({**wanted, "seed": s} for s in seeds_of(request.seed, request.n)))


def write_chat(texts: Sequence[str], order: Order, model: str) -> ChatResponse:
    """Write the texts of an order as choices."""
    choices = [
        Choice(index=index, message=Answer(content=text), seed=request["seed"])
        for index, (text, request) in enumerate(zip(texts, order.requests, strict=True))
    ]
    name = f"chatcmpl-{secrets.token_hex(12)}"
    return ChatResponse(id=name, created=int(time.time()), model=model, choices=choices)


def _read(message: Message) -> tuple[str, str | None]:
    """Split a message into its text and its picture."""
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    pictures = [part.image_url.url for part in message.content if isinstance(part, ImagePart)]
    if len(pictures) > 1:
        raise invalid("messages", f"may hold one picture, got {len(pictures)}")
    return "\n".join(texts), pictures[0] if pictures else None


def _task(text: str, picture: str | None) -> tuple[str, dict[str, Any]]:
    if picture is None:
        return "text_variation", {"prompt": text}
    if text:
        return "visual_question_answering", {"image": picture, "question": text}
    return "image_to_text", {"image": picture}
