"""Moving average of the weights."""

import torch
from torch import Tensor, nn

from udiff.settings import EmaSettings
from udiff.training.shard import local_parts


class Ema:
    """ema = decay ema + (1 - decay) weights after every step, sharded like the weights."""

    def __init__(self, modules: dict[str, nn.Module], settings: EmaSettings) -> None:
        self._settings = settings
        self._weights = {
            f"{name}.{key}": p for name, m in modules.items() for key, p in m.named_parameters()
        }
        self.averages: dict[str, Tensor] = {
            key: p.detach().clone() for key, p in self._weights.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights of a finished step in."""
        decay = self._settings.decay
        if self._settings.warmup:
            decay = min(decay, (1 + step) / (10 + step))
        if step + 1 < self._settings.first_step:
            decay = 0.0
        averages = local_parts(self.averages.values())
        torch._foreach_lerp_(averages, local_parts(self._weights.values()), 1 - decay)
