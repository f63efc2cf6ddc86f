"""What the workers of a chain have that run networks on pictures."""

from typing import Literal

from pydantic import Field, JsonValue, PositiveInt

from udiff.settings import Settings


class NetworkSettings(Settings):
    """How networks run, and on what; all but `workers` changes the last bits of what they make."""

    batch_size: PositiveInt
    """Pictures or texts per network call."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the networks that look at pictures."""
    row_group_size: PositiveInt = 256
    threads: PositiveInt = 1
    """CPU threads of a worker."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of a worker, 0 for the CPU."""
    workers: PositiveInt | None = None
    """Processes; as many as the cluster has room for where it is left open."""

    @property
    def device(self) -> str:
        """Where the networks run."""
        return "cuda" if self.gpus else "cpu"

    def options(self) -> dict[str, JsonValue]:
        """Give what a plan notes of these settings: two caches of other options differ."""
        return {
            "batch_size": self.batch_size,
            "row_group_size": self.row_group_size,
            "threads": self.threads,
            "device": self.device,
        }
