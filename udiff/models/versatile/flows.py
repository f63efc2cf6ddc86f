"""Flows: which data from which contexts; and the network as samplers call it."""

from typing import NamedTuple

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from udiff.models.versatile.network import Context, VersatileNetwork
from udiff.system import Prediction


class Flow(NamedTuple):
    """One kind of data from one kind of context."""

    data: str
    context: str


FLOWS = {
    "text_to_image": Flow("image", "text"),
    "image_variation": Flow("image", "image"),
    "image_to_text": Flow("text", "image"),
    "text_variation": Flow("text", "text"),
}
"""By the names of their tasks."""
RATIO = "_ratio"
"""A condition `<kind>` is a context of that kind, `<kind>_ratio` its share in a mix."""


class DataNetwork(nn.Module):
    """A network for one kind of data, whose contexts are conditions by name."""

    def __init__(self, network: VersatileNetwork, data: str) -> None:
        """Take the network itself, not a copy."""
        super().__init__()
        self.network = network
        self._data = data

    def forward(
        self, x_t: Float[Tensor, "batch ..."], t: Shaped[Tensor, " batch"], **conditions: Tensor
    ) -> Prediction:
        """Predict the noise; `<kind>` (batch, tokens, dim), and `<kind>_ratio` (batch,)."""
        contexts = [
            Context(name, tokens, conditions.get(name + RATIO, 1.0))
            for name, tokens in conditions.items()
            if not name.endswith(RATIO)
        ]
        return self.network(x_t, t, data=self._data, contexts=contexts)
