"""What objectives take, what they are, and how one is wrapped around another."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from udiff.system import Batch, Draws, Losses, Prediction, StepRng

Network = Callable[..., Prediction]
"""Called with x_t, t, and conditions by name: a module, or a wrapper around one."""


@runtime_checkable
class Objective(Protocol):
    """Draw first, compute after."""

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Make every random choice of a step."""

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the losses; no randomness is left."""


class Recorded:
    """A network that keeps its last prediction, for losses added around an objective.

    A wrapper of an objective hands it this in place of the network, and then reads what came back:
    the network runs once, however many wrappers there are.
    """

    prediction: Prediction

    def __init__(self, network: Network, *, feature_layer: int | None = None) -> None:
        """Wrap a network; `feature_layer` is the block whose tokens the prediction is to have."""
        self._network = network
        self._feature_layer = feature_layer

    def __call__(self, *inputs: Any, **conditions: Any) -> Prediction:
        """Ask the network.

        Raises:
            ValueError: two wrappers want tokens of different blocks; a prediction has one's.
        """
        if self._feature_layer is not None:
            wanted = conditions.setdefault("feature_layer", self._feature_layer)
            if wanted != self._feature_layer:
                raise ValueError(
                    f"losses want the tokens of blocks {wanted} and {self._feature_layer}; they "
                    "must be of the same block"
                )
        self.prediction = self._network(*inputs, **conditions)
        return self.prediction
