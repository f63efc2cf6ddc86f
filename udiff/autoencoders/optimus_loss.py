"""What Optimus learns from (arXiv 2004.04092, sections 3.1 and 3.3)."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from udiff.autoencoders.optimus import Optimus, TextMoments

KLMode = Literal["plain", "free_bits", "deterministic"]


class TextLosses(NamedTuple):
    """Of each text."""

    total: Float[Tensor, " texts"]
    reconstruction: Float[Tensor, " texts"]
    """Cross-entropy, summed over tokens."""
    kl: Float[Tensor, " texts"]


@dataclass(frozen=True)
class TextBound:
    """The evidence lower bound of texts."""

    beta: float = 1.0
    """Weight of the divergence."""
    mode: KLMode = "plain"
    """`free_bits` counts only dimensions above `free_nats`. `deterministic` takes log variances of
    0, of the divergence and of the sample both."""
    free_nats: float = 0.0
    is_length_weighted: bool = False
    """Divide the reconstruction by the number of tokens."""

    def __call__(
        self,
        optimus: Optimus,
        ids: Int64[Tensor, "texts encoder_tokens"],
        labels: Int64[Tensor, "texts decoder_tokens"],
        noise: Float[Tensor, "texts latent"],
    ) -> TextLosses:
        """Compute the losses; `noise` is standard normal."""
        is_deterministic = self.mode == "deterministic"
        moments, logits = optimus(ids, labels, noise, is_deterministic=is_deterministic)
        pad_id = optimus.decoder.pad_id
        reconstruction = sequence_nll(logits, labels, pad_id=pad_id)
        kl = self._kl(moments)
        weighted = reconstruction
        if self.is_length_weighted:
            weighted = reconstruction / (labels != pad_id).sum(1)
        return TextLosses(weighted + self.beta * kl, reconstruction, kl)

    def _kl(self, moments: TextMoments) -> Float[Tensor, " texts"]:
        mean, logvar = moments
        kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1)
        if self.mode == "free_bits":
            kl = torch.where(kl > self.free_nats, kl, 0)
        return kl.sum(1)


def sequence_nll(
    logits: Float[Tensor, "texts tokens vocabulary"],
    labels: Int64[Tensor, "texts tokens"],
    *,
    pad_id: int,
) -> Float[Tensor, " texts"]:
    """Sum the cross-entropy of every next token; what fills texts up does not count."""
    losses = cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=pad_id, reduction="none"
    )
    return losses.sum(1)
