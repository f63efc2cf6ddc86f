"""Masked diffusion of token ids (MDLM, arXiv 2406.07524) with the log-linear schedule.

Times run the paper's way, from 0 (all tokens known) to 1 (all masked): a token is masked with
probability (1 - e) t, and the SUBS parameterization lets a network speak of masked tokens alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from udiff.diffusion.objective import Network
from udiff.diffusion.time import TimeDistribution
from udiff.system import Batch, Draws, LocalRng, Losses, Prediction, StepRng

SCHEDULE_EPS = 1e-3
"""e: how far the schedule stays from masking everything."""
NEVER = -1e6
"""Added to the logit of the mask itself, which is never the answer."""

Ask = Callable[[Int64[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]], Prediction]
"""Given ids with masks and the tokens that are asked about, gives their logits."""


def total_noise(t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
    """Compute sigma(t) = -log(1 - (1 - e) t)."""
    return -torch.log1p(-(1 - SCHEDULE_EPS) * t)


def noise_rate(t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
    """Compute the derivative of `total_noise`."""
    return (1 - SCHEDULE_EPS) / (1 - (1 - SCHEDULE_EPS) * t)


def mask_chance(t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
    """Compute 1 - exp(-sigma(t)), the probability that a token is masked."""
    return (1 - SCHEDULE_EPS) * t


def loss_weight(t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
    """Compute sigma' / (exp(sigma) - 1) of arXiv 2406.07524, equation 10, which is 1 / t."""
    return 1 / t


def subs_log_probs(
    logits: Float[Tensor, "*tokens vocab"], *, mask_id: int
) -> Float[Tensor, "*tokens vocab"]:
    """Turn a masked token's logits into log probabilities of what it is, in float32.

    Tokens that are not masked are themselves (section 3.2.3): nothing is to be computed there.
    """
    return _without_mask(logits, mask_id).log_softmax(-1)


def _without_mask(logits: Tensor, mask_id: int) -> Tensor:
    logits = logits.float()
    ban = torch.zeros(logits.shape[-1], device=logits.device)
    ban[mask_id] = NEVER
    return logits + ban


# ---------------------------------------------------------------- times


@dataclass(frozen=True)
class MaskTimes:
    """Draws each sample's time from [minimum, 1]."""

    is_antithetic: bool = True
    """One time in each of as many equal parts of [0, 1] as the global batch has samples; otherwise
    all are independent."""
    minimum: float = 1e-3

    def draw(self, num_rows: int, rng: LocalRng) -> Float[Tensor, " batch"]:
        """Draw the times of this rank's rows of the global batch."""
        uniform = rng.uniform(num_rows)
        row = torch.arange(num_rows, device=uniform.device) * rng.world_size + rng.rank
        return self.at(uniform, row, num_rows * rng.world_size)

    def at(
        self, uniform: Float[Tensor, " batch"], row: Int64[Tensor, " batch"], num_rows: int
    ) -> Float[Tensor, " batch"]:
        """Turn numbers in [0, 1) into times; `row` of `num_rows` is a sample's place."""
        if self.is_antithetic:
            uniform = (uniform / num_rows + row / num_rows) % 1
        return (1 - self.minimum) * uniform + self.minimum


@dataclass(frozen=True)
class ImportanceTimes:
    """Another distribution's times, as `by_importance` moves them.

    Nothing makes up for it: the loss counts little masked texts more than it would.
    """

    times: TimeDistribution = MaskTimes()

    def draw(self, num_rows: int, rng: LocalRng) -> Float[Tensor, " batch"]:
        """Draw the times of this rank's rows of the global batch."""
        return by_importance(self.times.draw(num_rows, rng))


def by_importance(t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
    """Move times so that the logarithm of the mask's chance, not the chance, is linear in `t`.

    Both ends of it stay near where they are: about e at 0, 1 - e at 1.
    """
    low, high = math.log(-math.expm1(-SCHEDULE_EPS)), math.log1p(-SCHEDULE_EPS)
    return (low + (high - low) * t).exp() / (1 - SCHEDULE_EPS)


# ---------------------------------------------------------------- objective


@dataclass(frozen=True)
class MaskedText:
    """Learn tokens from the others: the mean over positions of -log p(token) / t where masked.

    The sum runs over masked positions and is divided by all positions (arXiv 2406.07524, equation
    10, per token), so that every position of a batch weighs alike, whatever is masked in it.
    """

    ask: Callable[[Network, Batch], Ask]
    """Makes of a network what is asked here, and binds what else it is told of a batch."""
    mask_id: int
    column: str
    """Of the batch: `<column>_tokens` holds ids, and `<column>_learned`, where there is one, which
    of them are to be learned; the others are never masked."""
    times: TimeDistribution = MaskTimes()
    padding: Literal["learned", "ignored"] = "learned"
    """Whether tokens after the first end token are learned too; a text learns to stop by that."""
    end_id: int = 1

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw a time per text, and a number per token which decides when it is masked."""
        tokens = batch[f"{self.column}_tokens"]
        return {
            "mask_t": self.times.draw(len(tokens), rng.local),
            "mask_uniform": rng.local.uniform(*tokens.shape),
        }

    def mask(
        self, batch: Batch, draws: Draws
    ) -> tuple[Int64[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        """Mask learned tokens by their chance; returns the ids and which of them to learn from."""
        tokens = batch[f"{self.column}_tokens"].long()
        masked = draws["mask_uniform"] < mask_chance(draws["mask_t"])[:, None]
        if (learned := batch.get(f"{self.column}_learned")) is not None:
            masked = masked & learned.bool()
        ids = tokens.masked_fill(masked, self.mask_id)
        if self.padding == "ignored":
            masked = masked & ~after_end(tokens, self.end_id)
        return ids, masked

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the loss."""
        ids, masked = self.mask(batch, draws)
        logits = _without_mask(self.ask(network, batch)(ids, masked).output, self.mask_id)
        targets = batch[f"{self.column}_tokens"].long()[masked]
        weight = loss_weight(draws["mask_t"])[:, None].expand(ids.shape)[masked]
        # A sum over no token at all is 0, with gradients that are 0.
        loss = (weight * cross_entropy(logits, targets, reduction="none")).sum() / ids.numel()
        return Losses(total=loss, terms={"masked_nll": loss})


def after_end(ids: Int64[Tensor, "batch tokens"], end_id: int) -> Bool[Tensor, "batch tokens"]:
    """Mark the tokens behind a text's first end token."""
    is_end = (ids == end_id).int()
    return is_end.cumsum(1) - is_end > 0
