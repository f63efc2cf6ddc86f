"""The dispersive loss (arXiv 2506.09027): hidden states of different samples repel each other."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import normalize, pdist

from udiff.diffusion.objective import Network, Objective, Recorded
from udiff.system import Batch, Draws, Losses, StepRng


@dataclass(frozen=True)
class Dispersed:
    """Add the dispersive loss of a block's output, over the samples of all ranks.

    The published DDT code detaches the gathered features, so that its loss teaches nothing; here it
    has its gradient.
    """

    objective: Objective
    layer: int
    """Number of the block, counted from 1."""
    weight: float = 0.5
    temperature: float = 1.0

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw what the objective draws."""
        return self.objective.draw(batch, rng)

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the objective's losses and the dispersion's."""
        recorded = Recorded(network, feature_layer=self.layer)
        losses = self.objective(recorded, batch, draws)
        assert recorded.prediction.feature is not None
        features = _of_all_ranks(recorded.prediction.feature.float().flatten(1))
        loss = dispersive_loss(features, temperature=self.temperature)
        return Losses(losses.total + self.weight * loss, {**losses.terms, "dispersive": loss})


def dispersive_loss(
    features: Float[Tensor, "batch dim"], *, temperature: float
) -> Float[Tensor, ""]:
    """Compute log mean exp(-|f_i - f_j|^2 / temperature) over pairs of samples, f of unit length.

    As published, 1e-5 is added to each pair's term.

    Raises:
        ValueError: there is but one sample, so no pair.
    """
    if len(features) < 2:
        raise ValueError("the dispersive loss needs at least 2 samples in a (micro-)batch")
    squared = pdist(normalize(features, dim=1)).square()
    return ((-squared / temperature).exp() + 1e-5).mean().log()


def _of_all_ranks(rows: Tensor) -> Tensor:
    """Gather rows with their gradient: FSDP's average over ranks is then that of the whole loss."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return torch.cat(all_gather(rows.contiguous()))
