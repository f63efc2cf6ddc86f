"""The evidence lower bound of texts, on cached tokens."""

from dataclasses import dataclass

from udiff.autoencoders.optimus import Optimus
from udiff.autoencoders.optimus_loss import TextBound
from udiff.system import Batch, Draws, Losses, StepRng

PIECES, LABELS = "pieces_tokens", "labels_tokens"
"""Columns: a text's ids for the encoder, and for the decoder."""


@dataclass(frozen=True)
class TextObjective:
    """The bound of each text, averaged over them."""

    bound: TextBound
    latent_dim: int

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw the posterior's noise."""
        return {"noise": rng.local.normal(len(batch[PIECES]), self.latent_dim)}

    def __call__(self, optimus: Optimus, batch: Batch, draws: Draws) -> Losses:
        """Compute the loss."""
        losses = self.bound(optimus, batch[PIECES].long(), batch[LABELS].long(), draws["noise"])
        terms = {"reconstruction": losses.reconstruction.mean(), "kl": losses.kl.mean()}
        return Losses(losses.total.mean(), terms, losses.total)
