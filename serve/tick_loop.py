"""The tick loop: one thread that drives all pictures under way, with one network call a tick."""

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from torch import Tensor, nn

from serve.records import EngineStoppedError
from udiff.samplers.ticks import Running, tick

logger = logging.getLogger(__name__)

Image = UInt8[np.ndarray, "height width 3"]
Decode = Callable[[list[Tensor]], UInt8[np.ndarray, "batch height width 3"]]


@dataclass(eq=False)
class Picture:
    """One picture under way."""

    running: Running
    image: Image | None = None

    @property
    def num_rows(self) -> int:
        """Count the rows that its next query takes in the network's batch: guided ones take two."""
        return self.running.num_rows


@dataclass(eq=False)
class Job:
    """The pictures of one request, and who waits for them."""

    pictures: list[Picture]
    deliver: Callable[[list[Image] | EngineStoppedError], None]
    """Called once or twice (the first counts), from any thread; it must not block or raise."""
    is_cancelled: bool = False
    """Set from any thread; a cancelled job takes part in no tick that begins later."""

    def close(self) -> None:
        """Close the samplers."""
        for picture in self.pictures:
            picture.running.sampling.steps.close()


class TickLoop:
    """Drive jobs in their order of arrival, as many pictures a tick as there are rows.

    A failed tick is a bug or a broken device: it ends the loop, every job under way is told, and
    `check` raises from then on, which has Serve replace the replica.
    """

    def __init__(
        self,
        network: nn.Module,
        decode: Decode,
        *,
        max_rows: int,
        stall_s: float = 120.0,
        on_tick: Callable[[int], None] = lambda num_rows: None,
    ) -> None:
        """Start the thread.

        Args:
            network: answers the queries.
            decode: makes images of finished samples.
            max_rows: rows of the network's batch in a tick; a guided picture takes two, and one
                picture is always driven.
            stall_s: longest time that a tick may take before `check` raises.
            on_tick: called with the rows of each tick.
        """
        self._network = network
        self._decode = decode
        self._max_rows = max_rows
        self._stall_s = stall_s
        self._on_tick = on_tick
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: list[Job] = []
        self._tick_began: float | None = None
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="ticks", daemon=True)
        self._thread.start()
        # A thread that is inside torch when the interpreter goes down aborts the process.
        atexit.register(self.close)

    def submit(self, job: Job) -> None:
        """Hand a job over; its end is delivered."""
        self._inbox.put(job)
        if self._is_stopped:
            job.deliver(EngineStoppedError("the tick loop has stopped"))

    def check(self) -> None:
        """Raise EngineStoppedError when no tick will come any more, or one takes too long."""
        if not self._thread.is_alive():
            raise EngineStoppedError("the tick thread is dead")
        began = self._tick_began
        if began is not None and time.monotonic() - began > self._stall_s:
            raise EngineStoppedError(f"a tick has taken over {self._stall_s:g} s")

    def close(self) -> None:
        """Stop after the tick under way and join the thread; jobs not done are told."""
        atexit.unregister(self.close)
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_in():
                self._drop_cancelled()
                self._tick(self._choose())
        except Exception:
            logger.exception("a tick failed; the engine stops")
        finally:
            self._is_stopped = True
            self._give_up()

    def _take_in(self) -> bool:
        """Take what has arrived, waiting when there is nothing to do; False when told to stop."""
        while not self._jobs or not self._inbox.empty():
            job = self._inbox.get()
            if job is None:
                return False
            self._jobs.append(job)
        return True

    def _drop_cancelled(self) -> None:
        for job in self._jobs:
            if job.is_cancelled:
                job.close()
        self._jobs = [job for job in self._jobs if not job.is_cancelled]

    def _choose(self) -> list[Picture]:
        chosen: list[Picture] = []
        num_rows = 0
        for picture in (p for job in self._jobs for p in job.pictures if p.image is None):
            num_rows += picture.num_rows
            if chosen and num_rows > self._max_rows:
                break
            chosen.append(picture)
        return chosen

    def _tick(self, pictures: list[Picture]) -> None:
        if not pictures:
            return
        self._tick_began = time.monotonic()
        self._on_tick(sum(picture.num_rows for picture in pictures))
        tick(self._network, [picture.running for picture in pictures])
        self._finish([p for p in pictures if p.running.query is None])
        self._tick_began = None

    def _finish(self, pictures: list[Picture]) -> None:
        if not pictures:
            return
        samples = [p.running.result for p in pictures if p.running.result is not None]
        for picture, image in zip(pictures, self._decode(samples), strict=True):
            picture.image = image
        for job in [job for job in self._jobs if all(p.image is not None for p in job.pictures)]:
            self._jobs.remove(job)
            job.deliver([p.image for p in job.pictures if p.image is not None])

    def _give_up(self) -> None:
        while not self._inbox.empty():
            if (job := self._inbox.get()) is not None:
                self._jobs.append(job)
        for job in self._jobs:
            job.close()
            job.deliver(EngineStoppedError("the engine stopped before the pictures were done"))
        self._jobs = []
