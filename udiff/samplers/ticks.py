"""Drive samplings: any number side by side, each at its own step, with one network call a tick."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from udiff.diffusion.guidance import guide
from udiff.system import Guidance, Query, Sampling


@dataclass
class Running:
    """A sampling under way: its pending query, or its result."""

    sampling: Sampling
    query: Query | None
    result: Tensor | None = None


def start(sampling: Sampling) -> Running:
    """Advance a sampling to its first query."""
    running = Running(sampling, None)
    _advance(running, None)
    return running


@torch.inference_mode()
def tick(network: nn.Module, running: Sequence[Running]) -> None:
    """Answer the pending query of each sampling with one call of the network.

    Guided samplings take two rows of the batch where guidance is on at their time, others one.
    """
    live = [(r, r.query) for r in running if r.query is not None]
    if not live:
        return
    guided = [(r, q) for r, q in live if r.sampling.guidance.scale_at(q.t) != 1]
    queries = [q for _, q in live + guided]
    x = torch.stack([q.x for q in queries])
    t = torch.tensor([q.t for q in queries], device=x.device)
    rows = [r.sampling.conditions for r, _ in live] + [
        r.sampling.null_conditions for r, _ in guided
    ]
    answers = network(x, t, **_stack(rows)).output.float()
    nulls = {id(r): answer for (r, _), answer in zip(guided, answers[len(live) :], strict=True)}
    for (r, query), answer in zip(live, answers[: len(live)], strict=True):
        _advance(r, _guided(r.sampling.guidance, query.t, answer, nulls.get(id(r))))


def drive(network: nn.Module, samplings: Iterable[Sampling]) -> list[Tensor]:
    """Run samplings to their ends, side by side, and return the samples in order."""
    running = [start(sampling) for sampling in samplings]
    while any(r.query is not None for r in running):
        tick(network, running)
    return [r.result for r in running if r.result is not None]


def _guided(guidance: Guidance, t: float, answer: Tensor, null: Tensor | None) -> Tensor:
    if null is None:
        return answer
    return guide(answer, null, scale=guidance.scale_at(t), channels=guidance.channels)


def _advance(running: Running, answer: Tensor | None) -> None:
    steps = running.sampling.steps
    try:
        running.query = next(steps) if answer is None else steps.send(answer)
    except StopIteration as end:
        running.query, running.result = None, end.value


def _stack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
