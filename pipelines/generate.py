"""Chain: requests -> pictures, spread over the cluster in batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext

from udiff.generate import PictureGenerator


class _Generate:
    """One generator per actor."""

    def __init__(self, bundle: str) -> None:
        self._generator = PictureGenerator(bundle)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        requests = batch["requests"][0]
        pictures = self._generator.generate(requests).numpy()
        return {"index": batch["index"], "pictures": [pictures]}


def generate_pictures(
    bundle: str,
    requests: Sequence[dict[str, Any]],
    *,
    workers: int,
    gpus: float = 0,
    batch_size: int = 64,
) -> np.ndarray:
    """Generate one picture per request, in their order: uint8 (pictures, height, width, 3)."""
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
    return np.concatenate([row["pictures"] for row in ordered])
