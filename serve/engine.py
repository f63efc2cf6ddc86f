"""The engine: a bundle on one device, sampling the pictures of all requests together.

It needs no Ray: `await Engine(bundle, device="cpu").generate(order)` in any event loop.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol, cast

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from serve.records import EngineStoppedError, InvalidOrderError, ModelFacts, Order
from serve.tick_loop import Image, Job, Picture, TickLoop
from udiff.autoencoders.pixels import to_uint8
from udiff.bundle import Bundle, load_bundle, load_latent_decoder
from udiff.samplers.ticks import drive, start
from udiff.settings import DataSettings
from udiff.system import Sampling, Task

TASK = "class_to_image"


class ClassRecipe(Protocol):
    """What the recipe of a class-conditional family holds."""

    num_classes: int
    data: DataSettings


def check_bundle(path: str) -> None:
    """Load a bundle as an engine does, and let go of it: whatever is wrong with it is raised here.

    Raises:
        FileNotFoundError: there is no bundle, or no autoencoder for it.
        ValueError: the bundle can't make pictures of classes.
    """
    bundle = load_bundle(path)
    _find_task(bundle)
    load_latent_decoder(bundle.recipe)


class Engine:
    """A served bundle; `close` it at the end."""

    def __init__(
        self,
        bundle_path: str,
        *,
        device: str,
        model_name: str | None = None,
        max_rows: int = 32,
        on_tick: Callable[[int], None] = lambda num_rows: None,
    ) -> None:
        """Load the bundle and sample a first picture, which also warms the device up.

        Args:
            bundle_path: folder of a bundle that makes pictures of classes.
            device: of torch, as `cpu` or `cuda`.
            model_name: what requests call the model; the recipe's family where left open.
            max_rows: rows of the network's batch in a tick; a guided picture takes two.
            on_tick: called with the rows of each tick, from the engine's thread.

        Raises:
            FileNotFoundError: there is no bundle, or no autoencoder for it.
            ValueError: the bundle can't make pictures of classes.
        """
        bundle = load_bundle(bundle_path)
        self._device = torch.device(device)
        self._task = _find_task(bundle)
        self._task.network.to(self._device)
        self._autoencoder = load_latent_decoder(bundle.recipe).to(self._device)
        self.facts = self._gather_facts(bundle, model_name)
        self._ticks = TickLoop(self._task.network, self._decode, max_rows=max_rows, on_tick=on_tick)

    async def generate(self, order: Order) -> UInt8[np.ndarray, "pictures height width 3"]:
        """Sample the pictures of an order; cancelling the call stops its ticks.

        Raises:
            InvalidOrderError: the model can't do that.
            EngineStoppedError: the engine ended before the pictures were done.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Image]] = loop.create_future()

        def deliver(outcome: list[Image] | EngineStoppedError) -> None:
            # The event loop may be gone, and then so is the caller.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, answer, outcome)

        job = Job([Picture(start(sampling)) for sampling in self._start(order)], deliver)
        self._ticks.submit(job)
        try:
            return np.stack(await answer)
        finally:
            job.is_cancelled = True

    def check(self) -> None:
        """Raise EngineStoppedError when the engine answers nothing any more."""
        self._ticks.check()

    def close(self) -> None:
        """Stop the engine's thread; calls under way end with EngineStoppedError."""
        self._ticks.close()

    def _start(self, order: Order) -> list[Sampling]:
        open_keys = {"num_steps": order.num_steps, "guidance_scale": order.guidance_scale}
        keys = {name: value for name, value in open_keys.items() if value is not None}
        seeds = range(order.seed, order.seed + order.num_pictures)
        try:
            requests = [self._task.request(label=order.label, seed=seed, **keys) for seed in seeds]
            return [self._task.start(request, device=self._device) for request in requests]
        except ValueError as error:
            raise InvalidOrderError(str(error)) from None

    def _decode(self, latents: list[Tensor]) -> UInt8[np.ndarray, "batch height width 3"]:
        with torch.inference_mode():
            return to_uint8(self._autoencoder.decode(torch.stack(latents))).cpu().numpy()

    def _gather_facts(self, bundle: Bundle, model_name: str | None) -> ModelFacts:
        # Two steps: the fewest that every sampler takes.
        latents = drive(self._task.network, self._start(Order(label=0, seed=0, num_steps=2)))
        _, height, width, _ = self._decode(latents).shape
        recipe = cast(ClassRecipe, bundle.recipe)
        return ModelFacts(
            name=model_name or bundle.recipe.family,
            num_classes=recipe.num_classes,
            class_names=recipe.data.class_names,
            width=width,
            height=height,
        )


def _find_task(bundle: Bundle) -> Task:
    tasks = bundle.system.tasks
    if TASK not in tasks:
        raise ValueError(
            f"{bundle.path} can't be served: its family {bundle.recipe.family} has no task {TASK}; "
            f"it has {', '.join(tasks) or 'none'}"
        )
    return tasks[TASK]


def _settle(answer: asyncio.Future[list[Image]], outcome: list[Image] | EngineStoppedError) -> None:
    if answer.done():
        return
    if isinstance(outcome, EngineStoppedError):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
