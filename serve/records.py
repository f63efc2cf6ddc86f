"""What front and engine say to each other: plain records, without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import UInt8

Output = UInt8[np.ndarray, "height width 3"] | str


@dataclass(frozen=True)
class TaskFacts:
    """One thing that the model can be asked for."""

    output: Literal["image", "text"]
    request: Mapping[str, Any]
    """JSON schema of its request."""
    size: str | None = None
    """Of its pictures where the request leaves it open, as `32x32`."""

    def takes(self, key: str) -> bool:
        """Say whether a request may have a key."""
        return key in self.request["properties"]


@dataclass(frozen=True)
class ModelFacts:
    """What the front has to know of the model to check requests by itself."""

    name: str
    tasks: Mapping[str, TaskFacts]
    class_names: tuple[str, ...] = ()
    """In the order of the labels; empty where the model has no names."""
    num_classes: int = 0


@dataclass(frozen=True)
class Order:
    """What one HTTP request asks for: outputs of one task, one for each of its requests."""

    task: str
    requests: tuple[Mapping[str, Any], ...]
    """Each with the keys of the task's request record."""


class InvalidOrderError(ValueError):
    """The model can't do what the order asks for."""


class EngineStoppedError(RuntimeError):
    """The engine ended before it answered; the same order gives the same pictures elsewhere."""


class EngineClient(Protocol):
    """The engine as the front sees it, wherever it runs."""

    async def describe(self) -> ModelFacts:
        """Tell what is served, as long as the engine works."""

    async def generate(self, order: Order) -> list[Output]:
        """Make the outputs of an order; cancelling the call stops its work."""
