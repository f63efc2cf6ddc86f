"""A worker of Ray Train as the trainer sees it; its metrics go to Ray's dashboard."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from ray import train
from ray.train.torch import get_device
from ray.util.metrics import Gauge


@dataclass
class RayRun:
    """One worker; Ray Train has opened the process group.

    `ray.train.report` is not called per step: it blocks for seconds. Gauges are scraped.
    """

    family: str
    rank: int = field(init=False)
    world_size: int = field(init=False)
    device: torch.device = field(init=False)
    _gauges: dict[str, Gauge] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        context = train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = get_device()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Set a gauge `udiff_train_<metric>` for each metric."""
        for name, value in metrics.items():
            if name not in self._gauges:
                gauge = Gauge(f"udiff_train_{name.replace('/', '_')}", tag_keys=("family",))
                self._gauges[name] = gauge
            self._gauges[name].set(value, {"family": self.family})
