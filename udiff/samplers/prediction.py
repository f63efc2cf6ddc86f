"""Samplers of velocities on networks that predict something else."""

import torch
from torch import Tensor

from udiff.diffusion.parameterization import VELOCITY, Parameterization, convert
from udiff.diffusion.path import Path
from udiff.system import Steps


def from_prediction(steps: Steps, *, path: Path, prediction: Parameterization) -> Steps:
    """Turn every answer of the network, guidance already applied, into the velocity asked for.

    Guidance and this conversion are both linear in the network's answer: their order is the same.
    """
    velocity: Tensor | None = None
    while True:
        try:
            query = steps.send(velocity)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            return end.value
        output = yield query
        point = path.at(torch.tensor(query.t, dtype=torch.float64))
        velocity = convert(output, query.x, point, source=prediction, target=VELOCITY)
