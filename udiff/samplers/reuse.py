"""Reuse of an encoder's state between steps (DDT, arXiv 2504.05741, section 3.4).

Works around any sampler, with networks whose prediction has a `state` that they also accept.
"""

import sys
from collections.abc import Callable, Container, Hashable, Iterable
from dataclasses import replace
from itertools import count

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from udiff.samplers.ticks import start, tick
from udiff.settings import ReuseSettings
from udiff.system import Carried, Sampling, Steps

TEMPLATE_SIZE = 8
"""Samplings from which the refresh steps are chosen."""


def reuse_encoder(steps: Steps, refresh_steps: Container[int]) -> Steps:
    """Run a sampler whose queries run the encoder only at the numbers in `refresh_steps`, 0 too."""
    carried, answer = Carried(), None
    for number in count():
        try:
            query = steps.send(answer)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            return end.value
        answer = yield replace(query, carried=carried, refresh=number in refresh_steps)
    raise AssertionError("counting never ends")


class RefreshPlan:
    """Says at which steps a network's encoder runs; searches are remembered."""

    def __init__(self, network: nn.Module, settings: ReuseSettings) -> None:
        self._network = network
        self._settings = settings
        self._found: dict[Hashable, tuple[int, ...]] = {}

    def apply(
        self, sampling: Sampling, *, key: Hashable, begin: Callable[[int, int], Sampling]
    ) -> Sampling:
        """Have a sampling run the encoder at the chosen steps alone.

        Args:
            sampling: not yet begun.
            key: everything but the weights that `begin` depends on; a search is made once for each.
            begin: makes a sampling of the same kind, from a number for its class and a seed.
        """
        steps = reuse_encoder(sampling.steps, self._choose(key, begin))
        return replace(sampling, steps=steps)

    def _choose(self, key: Hashable, begin: Callable[[int, int], Sampling]) -> Container[int]:
        every = self._settings.every
        if self._settings.choice == "fixed" or every == 1:
            return range(0, sys.maxsize, every)
        full_key = (_weights_identity(self._network), key)
        if full_key not in self._found:
            numbers = torch.Generator().manual_seed(0)
            classes = torch.randint(2**31, (TEMPLATE_SIZE,), generator=numbers).tolist()
            template = [begin(number, seed) for seed, number in enumerate(classes)]
            similarity = template_similarity(self._network, template)
            budget = max(1, len(similarity) // every)
            self._found[full_key] = choose_refresh_steps(similarity, budget)
        return self._found[full_key]


def template_similarity(
    network: nn.Module, samplings: Iterable[Sampling]
) -> Float[Tensor, "steps steps"]:
    """Compare the encoder's states of any two steps: cosine of each token, averaged.

    The samplings run one by one, with the encoder at every step; the states of one are kept
    (steps x tokens x dim, twice where it is guided).
    """
    each = [state_similarity(_encoder_states(network, sampling)) for sampling in samplings]
    return torch.stack(each).mean(0)


def state_similarity(states: Float[Tensor, "steps *tokens dim"]) -> Float[Tensor, "steps steps"]:
    """Average the cosine of every token between any two steps."""
    tokens = normalize(states.float(), dim=-1).flatten(1, -2)
    flat = tokens.flatten(1)
    return flat @ flat.T / tokens.shape[1]


def choose_refresh_steps(
    similarity: Float[Tensor, "steps steps"], num_refreshes: int
) -> tuple[int, ...]:
    """Choose the steps that lose the least similarity when each state serves until the next step.

    A dynamic program: cost[m][n] is the least loss of the first n steps with m refreshes; of equal
    ones the earliest step wins.
    """
    loss = (1.0 - similarity).double().cpu().numpy()
    num_steps = len(loss)
    # serving[n, j]: what the state of step j loses when it serves the steps j..n-1.
    serving = np.vstack([np.zeros(num_steps), np.cumsum(np.tril(loss), axis=0)])
    cost, choices = serving[:, 0].copy(), []
    for refreshes in range(2, num_refreshes + 1):
        best, choice = np.full(num_steps + 1, np.inf), np.zeros(num_steps + 1, int)
        for end in range(refreshes, num_steps + 1):
            options = cost[refreshes - 1 : end] + serving[end, refreshes - 1 : end]
            choice[end] = refreshes - 1 + options.argmin()
            best[end] = options.min()
        cost = best
        choices.append(choice)
    steps, end = [0], num_steps
    for choice in reversed(choices):
        end = int(choice[end])
        steps.insert(1, end)
    return tuple(steps)


def _encoder_states(network: nn.Module, sampling: Sampling) -> Float[Tensor, "steps branches ..."]:
    always = reuse_encoder(sampling.steps, range(sys.maxsize))
    running = start(network, replace(sampling, steps=always))
    states = []
    while running.query is not None:
        carried = running.query.carried
        assert carried is not None
        tick([running])
        states.append(torch.stack(list(carried.states.values())))
    return torch.stack(states)


def _weights_identity(network: nn.Module) -> tuple[tuple[int, int], ...]:
    """Tell weights apart: where each tensor lies, and how often it was written to."""
    return tuple((p.data_ptr(), p._version) for p in network.parameters())
