"""The engine: a bundle on one device, sampling what all requests ask for together.

It needs no Ray: `await Engine(bundle, device="cpu").generate(order)` in any event loop.
"""

import asyncio
import contextlib
from collections.abc import Callable

import numpy as np

from serve.records import (
    EngineStoppedError,
    InvalidOrderError,
    ModelFacts,
    Order,
    Output,
    TaskFacts,
)
from serve.tick_loop import Job, Pending, TickLoop
from udiff.generate import Generator
from udiff.system import Task


def check_bundle(path: str) -> None:
    """Load a bundle as an engine does, and let go of it: whatever is wrong with it is raised here.

    Raises:
        FileNotFoundError: there is no bundle, or no autoencoder for it.
        ValueError: there is nothing that the bundle could be asked for.
    """
    Generator(path, device="cpu")


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
        """Load the bundle and try each of its tasks, which also warms the device up.

        Args:
            bundle_path: folder of a bundle that has tasks.
            device: of torch, as `cpu` or `cuda`.
            model_name: what requests call the model; the recipe's family where left open.
            max_rows: rows of the network's batch in a tick; a guided sample takes two.
            on_tick: called with the rows of each tick, from the engine's thread.

        Raises:
            FileNotFoundError: there is no bundle, or no autoencoder for it.
            ValueError: there is nothing that the bundle could be asked for.
        """
        self._generator = Generator(bundle_path, device=device)
        recipe = self._generator.recipe
        self.facts = ModelFacts(
            name=model_name or recipe.family,
            tasks={name: self._try_out(task) for name, task in self._generator.tasks.items()},
            class_names=recipe.data.class_names,
            num_classes=getattr(recipe, "num_classes", 0),
        )
        self._ticks = TickLoop(self._generator.finish, max_rows=max_rows, on_tick=on_tick)

    async def generate(self, order: Order) -> list[Output]:
        """Make what an order asks for; cancelling the call stops its ticks.

        Raises:
            InvalidOrderError: the model can't do that.
            EngineStoppedError: the engine ended before the outputs were done.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Output]] = loop.create_future()

        def deliver(outcome: list[Output] | EngineStoppedError) -> None:
            # The event loop may be gone, and then so is the caller.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, answer, outcome)

        # Encoders of texts and pictures take their time, so requests begin beside the loop.
        job = Job(await asyncio.to_thread(self._start, order), deliver)
        self._ticks.submit(job)
        try:
            return await answer
        finally:
            job.is_cancelled = True

    def check(self) -> None:
        """Raise EngineStoppedError when the engine answers nothing any more."""
        self._ticks.check()

    def close(self) -> None:
        """Stop the engine's thread; calls under way end with EngineStoppedError."""
        self._ticks.close()

    def _start(self, order: Order) -> list[Pending]:
        try:
            task = self._generator.find_task(order.task)
            return [Pending(self._generator.start(task, each)) for each in order.requests]
        except ValueError as error:
            raise InvalidOrderError(str(error)) from None

    def _try_out(self, task: Task) -> TaskFacts:
        request = dict(task.example)
        if "num_steps" in task.request.model_fields:
            request["num_steps"] = 2  # the fewest that every sampler takes
        (output,) = self._generator.generate([request], task=task.name)
        return TaskFacts(task.output, task.request.model_json_schema(), _size(output))


def _size(output: Output) -> str | None:
    if not isinstance(output, np.ndarray):
        return None
    height, width, _ = output.shape
    return f"{width}x{height}"


def _settle(
    answer: asyncio.Future[list[Output]], outcome: list[Output] | EngineStoppedError
) -> None:
    if answer.done():
        return
    if isinstance(outcome, EngineStoppedError):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
