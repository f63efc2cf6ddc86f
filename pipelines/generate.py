"""Chain: requests -> pictures, spread over the cluster in batches."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext

from udiff.generate import PictureGenerator


@dataclass(frozen=True)
class Generated:
    """Pictures, and how fast they came."""

    pictures: np.ndarray
    """uint8 (pictures, height, width, 3), in the order of the requests."""
    images_per_s: float
    """From the start of the first batch to the end of the last."""


class _Generate:
    """One generator per actor."""

    def __init__(self, bundle: str) -> None:
        self._generator = PictureGenerator(bundle)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        started = time.time()
        pictures = self._generator.generate(batch["requests"][0]).numpy()
        times = {"started": [started], "ended": [time.time()]}
        return {"index": batch["index"], "pictures": [pictures], **times}


def generate_pictures(
    bundle: str,
    requests: Sequence[dict[str, Any]],
    *,
    workers: int,
    gpus: float = 0,
    batch_size: int = 64,
) -> Generated:
    """Generate one picture per request, with one generator in each of `workers` actors."""
    batches = [
        {"index": start, "requests": list(requests[start : start + batch_size])}
        for start in range(0, len(requests), batch_size)
    ]
    context = DataContext.get_current()
    context.enable_progress_bars = False
    rows = (
        ray.data.from_items(batches, override_num_blocks=len(batches))
        .map_batches(
            _Generate,
            fn_constructor_args=(bundle,),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(workers, len(batches))),
            num_cpus=1,
            num_gpus=gpus,
        )
        .take_all()
    )
    ordered = sorted(rows, key=lambda row: row["index"])
    seconds = max(row["ended"] for row in rows) - min(row["started"] for row in rows)
    pictures = np.concatenate([row["pictures"] for row in ordered])
    return Generated(pictures, len(pictures) / seconds)
