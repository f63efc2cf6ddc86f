"""A mixture of Gaussians in the plane, of which every prediction is known exactly."""

from collections.abc import Callable

import torch
from torch import Tensor

from udiff.diffusion.parameterization import Ends, Parameterization
from udiff.diffusion.path import Path
from udiff.system import Query, Steps

MEANS = torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
STD = 0.3


def draw(num_samples: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    modes = torch.multinomial(WEIGHTS, num_samples, replacement=True, generator=generator)
    return MEANS[modes] + STD * torch.randn(num_samples, 2, generator=generator)


def predict(x: Tensor, t: float, *, path: Path, prediction: Parameterization) -> Tensor:
    """What a perfect network predicts: the mean over all (data, noise) that x could have been."""
    point = path.at(torch.tensor(t))
    variance = point.alpha**2 * STD**2 + point.sigma**2
    away = x[:, None] - point.alpha * MEANS
    posterior = (WEIGHTS.log() - away.square().sum(-1) / (2 * variance)).softmax(-1)[..., None]
    data = (posterior * (MEANS + point.alpha * STD**2 / variance * away)).sum(1)
    noise = (posterior * (point.sigma / variance * away)).sum(1)
    return prediction.target(Ends(data, noise), point)


def integrate(steps: Steps, answer: Callable[[Query], Tensor]) -> Tensor:
    """Drive one sampler, whose sample is a whole cloud of points."""
    sent: Tensor | None = None
    try:
        while True:
            sent = answer(steps.send(sent))
    except StopIteration as end:
        return end.value


def distance(a: Tensor, b: Tensor) -> float:
    """Mean Wasserstein distance of the projections on 16 directions; equal sizes."""
    angles = torch.arange(16) * torch.pi / 16
    directions = torch.stack([angles.cos(), angles.sin()])
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean().item()
