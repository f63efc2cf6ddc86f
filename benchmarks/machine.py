"""What a figure was measured on, and where it is kept."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path("runs/benchmarks")


def describe_machine() -> dict[str, Any]:
    """Name the machine's size, and the day."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpus": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "gpu": gpu,
        "torch": torch.__version__,
    }


def record(name: str, figures: dict[str, Any]) -> None:
    """Print figures, and keep them with the machine they belong to."""
    result = {"benchmark": name, **describe_machine(), **figures}
    text = json.dumps(result, indent=1)
    print(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")


def spread(values: list[float]) -> dict[str, float]:
    """Give minimum, median and maximum."""
    return {"min": min(values), "median": median(values), "max": max(values)}
