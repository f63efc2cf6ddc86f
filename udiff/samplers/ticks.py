"""Drive samplings: any number side by side, each at its own step, one network call a tick.

One call for all rows that can be stacked: those of one network whose tensors have the same shapes.
Rows that reuse an encoder's state are apart from those that run the encoder.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from udiff.diffusion.guidance import guide
from udiff.system import Guidance, Query, Sampling

CONDITIONAL, NULL = "conditional", "null"


@dataclass
class Running:
    """A sampling under way: its pending query, or its result."""

    network: nn.Module
    sampling: Sampling
    query: Query | None
    result: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Count the rows that its query takes in the network's batch."""
        return len(list(_rows(self)))


class Row(NamedTuple):
    """One row of the network's batch."""

    running: Running
    query: Query
    branch: str
    conditions: Mapping[str, Tensor]

    @property
    def state(self) -> Tensor | None:
        """Return the encoder's state that the row is to use; none where the encoder runs."""
        if self.query.carried is None or self.query.refresh:
            return None
        return self.query.carried.states[self.branch]

    @property
    def key(self) -> tuple[int, str]:
        """Name the answer."""
        return id(self.running), self.branch

    @property
    def kind(self) -> Hashable:
        """Tell which rows share a call: those with equal kinds can be stacked."""
        tensors = {"": self.query.x, **self.conditions}
        shapes = tuple((name, t.shape, t.dtype) for name, t in sorted(tensors.items()))
        return id(self.running.network), self.state is None, shapes


def start(network: nn.Module, sampling: Sampling) -> Running:
    """Advance a sampling to its first query, which `network` is to answer."""
    running = Running(network, sampling, None)
    _advance(running, None)
    return running


@torch.inference_mode()
def tick(running: Sequence[Running]) -> None:
    """Answer the pending query of each sampling.

    Guided samplings take two rows of the batch where guidance is on at their time, or where the
    encoder runs and later queries may want its unconditional state; others take one.

    Raises:
        ValueError: a sampling reuses an encoder's state, and the network has none.
    """
    rows = [row for r in running for row in _rows(r)]
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.kind, []).append(row)
    answers: dict[tuple[int, str], Tensor] = {}
    for group in groups.values():
        answers |= {row.key: out for row, out in zip(group, _ask(group), strict=True)}
    for r, query in [(row.running, row.query) for row in rows if row.branch == CONDITIONAL]:
        pair = answers[id(r), CONDITIONAL], answers.get((id(r), NULL))
        _advance(r, _guided(r.sampling.guidance, query.t, *pair))


def drive(network: nn.Module, samplings: Iterable[Sampling]) -> list[Tensor]:
    """Run samplings to their ends, side by side, and return the samples in order."""
    running = [start(network, sampling) for sampling in samplings]
    finish(running)
    return [r.result for r in running if r.result is not None]


def finish(running: Sequence[Running]) -> None:
    """Run samplings to their ends, side by side."""
    while any(r.query is not None for r in running):
        tick(running)


def _rows(running: Running) -> Iterator[Row]:
    query, sampling = running.query, running.sampling
    if query is None:
        return
    yield Row(running, query, CONDITIONAL, sampling.conditions)
    # A state may be wanted where guidance is on even if it is found where guidance is off.
    is_kept = query.carried is not None and query.refresh and sampling.guidance.is_ever_on
    if is_kept or sampling.guidance.is_on(query.t):
        yield Row(running, query, NULL, sampling.null_conditions)


def _ask(rows: Sequence[Row]) -> Tensor:
    """Call the network for rows of one kind."""
    network = rows[0].running.network
    x = torch.stack([row.query.x for row in rows])
    t = torch.tensor([row.query.t for row in rows], device=x.device)
    conditions = {
        name: torch.stack([row.conditions[name] for row in rows]) for name in rows[0].conditions
    }
    states = [row.state for row in rows if row.state is not None]
    if states:
        conditions["state"] = torch.stack(states)
    prediction = network(x, t, **conditions)
    for number, row in enumerate(rows):
        if row.query.carried is not None and not states:
            if prediction.state is None:
                raise ValueError("this network has no encoder whose state could be reused")
            # A copy: a view would keep the states of the whole batch alive.
            row.query.carried.states[row.branch] = prediction.state[number].clone()
    return prediction.output.float()


def _guided(guidance: Guidance, t: float, answer: Tensor, null: Tensor | None) -> Tensor:
    if null is None or not guidance.is_on(t):
        return answer
    return guide(
        answer,
        null,
        scale=guidance.scale_at(t),
        channels=guidance.channels,
        first_channel=guidance.first_channel,
        other_scale=guidance.other_scale,
    )


def _advance(running: Running, answer: Tensor | None) -> None:
    steps = running.sampling.steps
    try:
        running.query = next(steps) if answer is None else steps.send(answer)
    except StopIteration as end:
        running.query, running.result = None, end.value
