"""Networks that losses ask and nobody trains."""

from collections.abc import Callable

from torch import Tensor, nn


class Frozen:
    """A network without gradients of its own, loaded at its first use.

    So a recipe builds, and a bundle loads, without the networks that only training asks; and they
    are no modules of a system, which would be sharded and saved.
    """

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._network: nn.Module | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Ask the network, on the device of what it is asked."""
        if self._network is None:
            self._network = self._load().eval().requires_grad_(False).to(inputs[0].device)
        return self._network(*inputs)
