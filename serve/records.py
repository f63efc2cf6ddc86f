"""What front and engine say to each other: plain records, without torch."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import UInt8


@dataclass(frozen=True)
class ModelFacts:
    """What the front has to know of the model to check requests by itself."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    """In the order of the labels; empty where the model has no names."""
    width: int
    height: int

    @property
    def size(self) -> str:
        """Write the one picture size that the model makes, as `32x32`."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Order:
    """Pictures that one request asks for; picture i is sampled with seed + i."""

    label: int
    seed: int
    num_pictures: int = 1
    num_steps: int | None = None
    """The recipe's where left open, and so is the guidance."""
    guidance_scale: float | None = None


class InvalidOrderError(ValueError):
    """The model can't do what the order asks for."""


class EngineStoppedError(RuntimeError):
    """The engine ended before it answered; the same order gives the same pictures elsewhere."""


class EngineClient(Protocol):
    """The engine as the front sees it, wherever it runs."""

    async def describe(self) -> ModelFacts:
        """Tell what is served, as long as the engine works."""

    async def generate(self, order: Order) -> UInt8[np.ndarray, "pictures height width 3"]:
        """Make the pictures of an order; cancelling the call stops its work."""
