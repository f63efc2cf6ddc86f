"""Texts as Dual Diffusion's transformer sees them: T5's states, with a row of its own for masks."""

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from udiff.diffusion.masked_text import Ask
from udiff.diffusion.objective import Network
from udiff.encoders.frozen import Frozen
from udiff.encoders.t5 import T5
from udiff.models.dual_diffusion.network import MaskRow
from udiff.system import Batch, Draws, Prediction

DROPPED_TEXT = " "
"""What training shows in place of a dropped caption; sampling's unconditional text is empty."""


class TextStates:
    """Ids, masked ones among them -> states of a frozen T5, through which the row has gradients."""

    def __init__(self, encoder: Frozen[T5], mask_row: MaskRow, *, mask_id: int) -> None:
        self._encoder = encoder
        self.mask_row = mask_row
        self._mask_id = mask_id
        self._dropped: dict[tuple[torch.device, int], Tensor] = {}

    def __call__(
        self, ids: Int64[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens text_dim"]:
        """Find the states; the row stands where the mask's id does."""
        encoder = self._encoder.on(ids.device)
        return encoder.encode_embedded(self.mask_row(encoder.embed(ids), ids == self._mask_id))

    def of_captions(self, batch: Batch, draws: Draws) -> Float[Tensor, "batch tokens text_dim"]:
        """Find the states of `caption_tokens`; dropped captions have those of a blank."""
        ids = _pick(batch, draws, "caption_tokens").long()
        return self._drop(self._encoder.on(ids.device).encode(ids), draws)

    def of_cached_captions(
        self, batch: Batch, draws: Draws
    ) -> Float[Tensor, "batch tokens text_dim"]:
        """Take the states from the column `caption`; dropped captions have those of a blank."""
        return self._drop(_pick(batch, draws, "caption").float(), draws)

    def _drop(self, states: Tensor, draws: Draws) -> Tensor:
        blank = self._of_blank(states.device, states.shape[1])
        return torch.where(draws["is_dropped"][:, None, None], blank, states)

    def _of_blank(self, device: torch.device, num_tokens: int) -> Tensor:
        key = device, num_tokens
        if key not in self._dropped:
            encoder = self._encoder.on(device)
            ids = encoder.tokenize([DROPPED_TEXT], num_tokens).to(device)
            self._dropped[key] = encoder.encode(ids)
        return self._dropped[key]


def _pick(batch: Batch, draws: Draws, column: str) -> Tensor:
    """Take each sample's first caption or its second, which is the column `re...`."""
    if "is_second" not in draws:
        return batch[column]
    is_second = draws["is_second"].view(-1, *[1] * (batch[column].ndim - 1))
    return torch.where(is_second, batch[f"re{column}"], batch[column])


def bind_text_head(states: TextStates, network: Network, batch: Batch) -> Ask:
    """Make of a network what masked text diffusion asks, given the batch's clean latents."""
    return partial(_ask, network, states, batch["latent"])


def _ask(
    network: Network, states: TextStates, latent: Tensor | None, ids: Tensor, masked: Tensor
) -> Prediction:
    # The text branch is not told the time: it always gets 0.
    t = torch.zeros(len(ids), device=ids.device)
    return network(latent, t, text=states(ids), logits_at=masked)


class TextNetwork(nn.Module):
    """The network as samplers of text ask it: ids -> logits of the masked ones, the others' 0."""

    def __init__(self, denoiser: nn.Module, states: TextStates, *, mask_id: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.mask_row = states.mask_row  # so that it moves along
        self._states = states
        self._mask_id = mask_id

    def forward(
        self,
        x_t: Int64[Tensor, "batch tokens"],
        t: Float[Tensor, " batch"],
        *,
        latent: Float[Tensor, "batch channels height width"] | None = None,
    ) -> Prediction:
        """Answer (batch, tokens, vocab_size), given a picture's clean latent or none; not time."""
        masked = x_t == self._mask_id
        logits = _ask(self.denoiser, self._states, latent, x_t, masked).output
        answer = logits.new_zeros(*x_t.shape, logits.shape[-1])
        answer[masked] = logits
        return Prediction(answer)
