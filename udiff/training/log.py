"""The run's own record: `metrics.jsonl`, a line a logged step, and files for TensorBoard."""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


class MetricsLog:
    """Append-only log of a run that goes on from a given step: later lines are cut off first."""

    def __init__(self, folder: Path, *, from_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / METRICS
        kept = [row for row in read_metrics(folder) if row["step"] <= from_step]
        staged = file.with_suffix(f".{os.getpid()}")
        staged.write_text("".join(json.dumps(row) + "\n" for row in kept))
        staged.replace(file)
        self._file: TextIO = file.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush to disk."""
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read a run's metrics; a last line that was cut short by a kill is left out."""
    file = folder / METRICS
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def select_losses(row: dict[str, float]) -> dict[str, float]:
    """Select what the phases minimize from a row of metrics: `loss`, or `<phase>/loss` of each."""
    return {name: value for name, value in row.items() if name.rpartition("/")[2] == "loss"}


class FolderLock:
    """Exclusive use of a run folder; the system releases it when the process dies."""

    def __init__(self, folder: Path, *, timeout_s: float) -> None:
        """Wait for the lock: the processes of a killed job live on for some seconds.

        Raises:
            TimeoutError: another job is training into the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / ".lock").open("w")
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"another job is training into {folder}: wait for it, or name another"
                        " folder"
                    ) from None
                time.sleep(0.2)
            else:
                return

    def release(self) -> None:
        """Let others in."""
        self._file.close()
