"""Networks that losses and samplers ask and nobody trains."""

from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)


class Frozen(Generic[N]):
    """A network without gradients of its own, loaded at its first use.

    So a recipe builds, and a bundle loads, without the networks that only training asks; and they
    are no modules of a system, which would be sharded and saved.
    """

    def __init__(self, load: Callable[[], N]) -> None:
        self._load = load
        self._network: N | None = None
        self._loading = Lock()

    def on(self, device: torch.device) -> N:
        """Give the network itself, on a device."""
        with self._loading:  # a server asks from several threads
            if self._network is None:
                self._network = self._load().eval().requires_grad_(False)
            return self._network.to(device)

    def __call__(self, *inputs: Tensor) -> Any:
        """Ask the network, on the device of what it is asked."""
        return self.on(inputs[0].device)(*inputs)
