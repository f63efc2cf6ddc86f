"""Representation alignment (REPA, arXiv 2410.06940, equation 8): a block's tokens, after a trained
projector, point the same way as those of a frozen vision encoder.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from udiff.diffusion.objective import Network, Objective, Recorded
from udiff.system import Batch, Draws, Losses, StepRng

FEATURE_COLUMN = "dino_feature"

Teacher = Callable[[Batch], Float[Tensor, "batch tokens dim"]]
"""Finds the features that a batch is aligned to."""


class Projector(nn.Sequential):
    """Three linear layers with SiLU between them, applied to each token."""

    def __init__(self, dim: int, *, hidden_dim: int, feature_dim: int) -> None:
        super().__init__(
            nn.Linear(dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, feature_dim),
        )


@dataclass(frozen=True)
class Aligned:
    """Add 1 - cosine of projected tokens and a teacher's features to an objective's loss."""

    objective: Objective
    projector: nn.Module
    teacher: Teacher
    layer: int
    """Number of the block, counted from 1, whose output is aligned."""
    weight: float = 0.5

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw what the objective draws."""
        return self.objective.draw(batch, rng)

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the objective's losses and the alignment's."""
        recorded = Recorded(network, feature_layer=self.layer)
        losses = self.objective(recorded, batch, draws)
        assert recorded.prediction.feature is not None
        projected = self.projector(recorded.prediction.feature).float()
        height, width = batch["latent"].shape[-2:]
        target = resize_tokens(self.teacher(batch), projected.shape[1], aspect=height / width)
        loss = alignment_loss(projected, target)
        return Losses(losses.total + self.weight * loss, {**losses.terms, "alignment": loss})


def cached_features(batch: Batch) -> Float[Tensor, "batch tokens dim"]:
    """Take the features that were cached with the latents."""
    return batch[FEATURE_COLUMN].float()


def alignment_loss(
    projected: Float[Tensor, "batch tokens dim"], target: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, ""]:
    """Average 1 - cosine over all tokens."""
    return (1 - cosine_similarity(projected, target, dim=-1)).mean()


def resize_tokens(
    features: Float[Tensor, "batch tokens dim"], num_tokens: int, *, aspect: float
) -> Float[Tensor, "batch resized dim"]:
    """Interpolate a grid of features bilinearly to as many tokens as the network has.

    Args:
        features: of a grid of the latent's shape, row by row.
        num_tokens: of the network.
        aspect: height / width of both grids.
    """
    if features.shape[1] == num_tokens:
        return features
    before, after = (_grid(count, aspect) for count in (features.shape[1], num_tokens))
    grid = features.transpose(1, 2).unflatten(2, before)
    resized = interpolate(grid, size=after, mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def _grid(num_tokens: int, aspect: float) -> tuple[int, int]:
    height = round(math.sqrt(num_tokens * aspect))
    if height == 0 or num_tokens % height:
        raise ValueError(f"{num_tokens} tokens are no grid of aspect {aspect:g}")
    return height, num_tokens // height
