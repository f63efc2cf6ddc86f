"""Sampling of masked text diffusion (MDLM, arXiv 2406.07524, sections 4.1 and 4.2)."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from udiff.diffusion.masked_text import mask_chance, subs_log_probs
from udiff.system import Query, Steps

LAST_TIME = 1e-5
Race = Callable[[Bool[Tensor, " tokens"]], Float[Tensor, "masked vocab"]]
"""Gives numbers from [0, 1), a row for each token that is still masked."""


def mask_times(num_steps: int, last_time: float = LAST_TIME) -> Float[Tensor, " times"]:
    """Space the times of a sampling evenly from 1 (all masked) to almost 0."""
    return torch.linspace(1, last_time, num_steps + 1)


def unmask(
    ids: Int64[Tensor, " tokens"],
    is_fixed: Bool[Tensor, " tokens"],
    *,
    mask_id: int,
    num_steps: int,
    race: Race,
    method: Literal["cached", "plain"] = "cached",
    fill_rest: bool = True,
    last_time: float = LAST_TIME,
) -> Steps:
    """Uncover a text's tokens step by step; each keeps what it was first found to be.

    Queries hold the ids, masks among them, and the time; they are answered with logits of all
    tokens (tokens, vocab), of which those of masked tokens are read. The result is the ids.

    Args:
        ids: of which those in `is_fixed` are kept; the others may hold anything.
        is_fixed: a prompt, or any tokens between which the text is to be filled in.
        mask_id: the id that stands for a masked token.
        num_steps: of the ancestral sampling; at most this many queries, and one for the rest.
        race: random numbers of each step, for the race between tokens.
        method: `cached` asks only when a token has been uncovered since (exact for networks that
            are not told the time), and takes the time itself as the chance of a mask; `plain` asks
            at every step, and takes the schedule's chance.
        fill_rest: after the steps, ask once more and take the likeliest token of each mask left.
        last_time: where the steps end.
    """
    x = torch.where(is_fixed, ids, mask_id)
    times = mask_times(num_steps, last_time)
    step = (1 - last_time) / num_steps
    chance = mask_chance if method == "plain" else _itself
    probs: Tensor | None = None
    for t in times[:-1]:
        masked = x == mask_id
        if probs is None:
            answer = yield Query(x, t.item())
            probs = subs_log_probs(answer[masked], mask_id=mask_id).exp()
        found = _race(probs, race(masked), chance(t), chance(t - step), mask_id)
        x = x.masked_scatter(masked, found)
        if method == "plain" or (found != mask_id).any():
            probs = None
    if fill_rest:
        masked = x == mask_id
        answer = yield Query(x, times[-1].item())
        x = x.masked_scatter(masked, subs_log_probs(answer[masked], mask_id=mask_id).argmax(-1))
    return x


def _race(probs: Tensor, uniform: Tensor, now: Tensor, then: Tensor, mask_id: int) -> Tensor:
    """Draw what each token is at the next time: one of the vocabulary, or masked still."""
    q = probs * (now - then).to(probs.device)
    q[:, mask_id] = then
    return first_to_finish(q, uniform)


def first_to_finish(
    q: Float[Tensor, "*tokens vocab"], uniform: Float[Tensor, "*tokens vocab"]
) -> Int64[Tensor, "*tokens"]:
    """Draw from unnormalized probabilities by a race of exponential variables, as officially."""
    return (q / (1e-10 - (uniform + 1e-10).log())).argmax(-1)


def _itself(t: Tensor) -> Tensor:
    return t
