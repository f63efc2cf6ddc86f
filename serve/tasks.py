"""Any task of the model by its name: requests as its record has them, pictures and text back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from serve.errors import missing_task
from serve.images import encode_png
from serve.records import ModelFacts, Order, Output
from serve.requests import MAX_OUTPUTS


class TaskRequest(BaseModel):
    """A request for outputs of one task."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    requests: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_OUTPUTS)
    """Each as the task's JSON schema says (`GET /v1/models` shows it)."""


class TaskOutput(BaseModel):
    """A picture as PNG, or a text."""

    b64_json: str | None = None
    text: str | None = None


class TaskResponse(BaseModel):
    """The outputs, in the order of the requests."""

    task: str
    data: list[TaskOutput]


def plan_task(task: str, request: TaskRequest, facts: ModelFacts) -> Order:
    """Turn a request into an order of this model.

    Raises:
        ApiError: 404 for a task that it does not have.
    """
    if task not in facts.tasks:
        raise missing_task(f"{task!r}", facts.tasks)
    return Order(task, tuple(request.requests))


def write_outputs(outputs: Sequence[Output], order: Order) -> TaskResponse:
    """Write the outputs of an order."""
    return TaskResponse(task=order.task, data=[_write(output) for output in outputs])


def _write(output: Output) -> TaskOutput:
    if isinstance(output, np.ndarray):
        return TaskOutput(b64_json=encode_png(output))
    return TaskOutput(text=output)
