"""The tick loop: one thread that drives all samples under way, with one network call a tick."""

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.records import EngineStoppedError, Output
from udiff.generate import Sample
from udiff.samplers.ticks import tick

logger = logging.getLogger(__name__)

Finish = Callable[[list[Sample]], list[Output]]


@dataclass(eq=False)
class Pending:
    """One sample under way, and what was made of it."""

    sample: Sample
    output: Output | None = None


@dataclass(eq=False)
class Job:
    """The samples of one request, and who waits for them."""

    pending: list[Pending]
    deliver: Callable[[list[Output] | EngineStoppedError], None]
    """Called once or twice (the first counts), from any thread; it must not block or raise."""
    is_cancelled: bool = False
    """Set from any thread; a cancelled job takes part in no tick that begins later."""

    def close(self) -> None:
        """Close the samplers."""
        for each in self.pending:
            each.sample.running.sampling.steps.close()


class TickLoop:
    """Drive jobs in their order of arrival, as many samples a tick as there are rows.

    A failed tick is a bug or a broken device: it ends the loop, every job under way is told, and
    `check` raises from then on, which has Serve replace the replica.
    """

    def __init__(
        self,
        finish: Finish,
        *,
        max_rows: int,
        stall_s: float = 120.0,
        on_tick: Callable[[int], None] = lambda num_rows: None,
    ) -> None:
        """Start the thread.

        Args:
            finish: makes pictures and text of samples at their ends.
            max_rows: rows of the network's batch in a tick; a guided sample takes two, and one
                sample is always driven.
            stall_s: longest time that a tick may take before `check` raises.
            on_tick: called with the rows of each tick.
        """
        self._finish_samples = finish
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

    def _choose(self) -> list[Pending]:
        chosen: list[Pending] = []
        num_rows = 0
        for pending in (p for job in self._jobs for p in job.pending if p.output is None):
            num_rows += pending.sample.running.num_rows
            if chosen and num_rows > self._max_rows:
                break
            chosen.append(pending)
        return chosen

    def _tick(self, chosen: list[Pending]) -> None:
        if not chosen:
            return
        self._tick_began = time.monotonic()
        running = [pending.sample.running for pending in chosen]
        self._on_tick(sum(each.num_rows for each in running))
        tick(running)
        self._finish([p for p in chosen if p.sample.running.query is None])
        self._tick_began = None

    def _finish(self, ended: list[Pending]) -> None:
        if not ended:
            return
        outputs = self._finish_samples([pending.sample for pending in ended])
        for pending, output in zip(ended, outputs, strict=True):
            pending.output = output
        for job in [job for job in self._jobs if all(p.output is not None for p in job.pending)]:
            self._jobs.remove(job)
            job.deliver([p.output for p in job.pending if p.output is not None])

    def _give_up(self) -> None:
        while not self._inbox.empty():
            if (job := self._inbox.get()) is not None:
                self._jobs.append(job)
        for job in self._jobs:
            job.close()
            job.deliver(EngineStoppedError("the engine stopped before it was done"))
        self._jobs = []
