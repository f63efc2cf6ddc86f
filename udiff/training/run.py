"""Where a training process runs: its rank, its device, and who hears of its metrics."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist


class Run(Protocol):
    """One process of a training run; a process group is open."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, metrics: Mapping[str, float]) -> None:
        """Pass metrics on to whoever watches; called on rank 0."""
        ...


@dataclass(frozen=True)
class LocalRun:
    """A run without Ray."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nobody watches."""


@contextmanager
def local_run(
    rank: int = 0, world_size: int = 1, *, rendezvous: Path | None = None
) -> Iterator[LocalRun]:
    """Open the process group of a run without Ray.

    Args:
        rank: of this process.
        world_size: number of processes.
        rendezvous: a file name, not used yet, that all processes can reach; needed with several.
    """
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as folder:
        file = rendezvous or Path(folder) / f"rendezvous-{os.getpid()}"
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{file.absolute()}",
            rank=rank,
            world_size=world_size,
        )
        try:
            yield LocalRun(rank, world_size, device)
            # Without it a process of gloo aborts at exit about every second time.
            dist.barrier()
        finally:
            dist.destroy_process_group()
