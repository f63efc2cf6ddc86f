"""Where each block of a network is kept in the official layouts.

Current files (February 2023) list data and context blocks flat, as our networks do:
`diffuser.image.data_blocks.3.0.op.weight`. First-release files (November 2022), the two-flow VD-DC
and Stable Diffusion nest them in a U-Net: `input_blocks.3.0.op.weight`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from udiff.models.versatile.plan import Level, Plan
from udiff.weights import WeightsError


class Place(NamedTuple):
    """One block's name in both layouts, without trailing dot."""

    flat: str
    nested: str


def block_places(plan: Plan) -> Iterator[Place]:
    """List all data and context blocks in the order in which they run."""
    data = context = 0
    for nested, is_context in _nested_names(plan):
        if is_context:
            yield Place(f"context_blocks.{context}.0", nested)
            context += 1
        else:
            yield Place(f"data_blocks.{data}.0", nested)
            data += 1


def _nested_names(plan: Plan) -> Iterator[tuple[str, bool]]:
    pushes = sum(step.kind == "push" for step in plan.steps)
    section, entry, item = "input_blocks", 0, 0
    for step in plan.steps:
        if step.kind == "push":
            entry, item = entry + 1, 0
            if section == "input_blocks" and entry == pushes:
                section = "middle_block"
        elif step.kind == "pop":
            entry, item = (entry + 1 if section == "output_blocks" else 0), 0
            section = "output_blocks"
        elif step.kind == "head":
            yield "out", False
        else:
            within = f"{item}" if section == "middle_block" else f"{entry}.{item}"
            yield f"{section}.{within}", step.kind == "context"
            item += 1


def infer_plan(weights: Mapping[str, Tensor]) -> Plan:
    """Find the plan of a diffuser by its weights, flat or nested, of any kind of data.

    In the flat layout, neighboring levels of equal width do not show which of them has contexts:
    then it is the finer ones.

    Raises:
        WeightsError: they are no such weights.
    """
    try:
        if any(key.startswith("input_blocks.") for key in weights):
            return _nested_plan(weights)
        return _flat_plan(weights)
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(f"these are no weights of a diffuser: {error}") from None


def _nested_plan(weights: Mapping[str, Tensor]) -> Plan:
    positions = _positions(weights, "input_blocks.1.0", "out.0")
    levels: list[list[tuple[int, bool]]] = [[]]
    for entry in range(1, _count(weights, r"input_blocks\.(\d+)\.")):
        name = f"input_blocks.{entry}"
        norm = weights.get(f"{name}.0.out_layers.0.weight")
        if norm is None:
            levels.append([])
        else:
            has_context = f"{name}.1.norm.weight" in weights
            levels[-1].append((len(norm) // positions, has_context))
    channels = len(weights["input_blocks.0.0.weight"]) // positions
    return Plan(channels, tuple(Level(level[0][0], len(level), level[0][1]) for level in levels))


def _flat_plan(weights: Mapping[str, Tensor]) -> Plan:
    count = _count(weights, r"data_blocks\.(\d+)\.")
    positions = _positions(weights, "data_blocks.1.0", f"data_blocks.{count - 1}.0.0")
    widths = [_residual_width(weights, number, positions) for number in range(1, count - 1)]
    runs: list[list[int]] = [[]]
    for width in widths:
        if width is None:
            runs.append([])
        else:
            runs[-1].append(width)
    # Down the levels, the last with the middle and its own way up, and up the others.
    num_levels = (len(runs) + 1) // 2
    sizes = [(run[0], len(run)) for run in runs[: num_levels - 1]]
    lowest = runs[num_levels - 1]
    sizes.append((lowest[0], (len(lowest) - 3) // 2))
    number = _count(weights, r"context_blocks\.(\d+)\.")
    found = [len(weights[f"context_blocks.{i}.0.norm.weight"]) for i in range(number)]
    channels = len(weights["data_blocks.0.0.weight"]) // positions
    for attention in _subsets(len(sizes)):
        levels = [Level(*size, has) for size, has in zip(sizes, attention, strict=True)]
        plan = Plan(channels, tuple(levels))
        wanted = [step.channels_in for step in plan.steps if step.kind == "context"]
        if wanted == found or not found:
            return plan
    raise ValueError(f"no levels have context blocks of widths {found}")


def _subsets(number: int) -> Iterator[tuple[bool, ...]]:
    """List which levels may have contexts; those with contexts at finer levels first."""
    for mask in range(2**number):
        yield tuple(not mask >> (number - 1 - level) & 1 for level in range(number))


def _residual_width(weights: Mapping[str, Tensor], number: int, positions: int) -> int | None:
    norm = weights.get(f"data_blocks.{number}.0.out_layers.0.weight")
    return None if norm is None else len(norm) // positions


def _positions(weights: Mapping[str, Tensor], first_block: str, head_norm: str) -> int:
    """Count the positions that residual blocks see flat, and the last norm does not."""
    flat = len(weights[f"{first_block}.out_layers.0.weight"])
    return flat // len(weights[f"{head_norm}.weight"])


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, key) for key in weights)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)
