"""Dual Diffusion's image loss (arXiv 2501.00289): flow matching, measured at the data."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from udiff.diffusion.objective import Network
from udiff.diffusion.path import per_sample
from udiff.models.dual_diffusion.network import TIMESTEP_SCALE
from udiff.system import Batch, Draws, Losses, StepRng

NUM_LEVELS = 1000


def noise_level(normal: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Turn standard normals into noise levels: a logistic, on a grid of 0.001 to 1.

    Float32 as officially: 1000 times a level is not always a whole number.
    """
    index = (normal.sigmoid() * NUM_LEVELS).long()
    return level_at(index)


def level_at(index: Int64[Tensor, "*levels"]) -> Float[Tensor, "*levels"]:
    """Give the noise level of an index; 0 is pure noise."""
    return (NUM_LEVELS - index).float() / NUM_LEVELS


@dataclass(frozen=True)
class ImageFlow:
    """Mean of |x_t - sigma v - x|^2, which is sigma^2 |v - (noise - x)|^2.

    x_t = (1 - sigma) x + sigma noise, and the network predicts v = noise - x.
    """

    text: Callable[[Batch, Draws], Float[Tensor, "batch tokens text_dim"]]
    """States of the batch's captions, given which of them are dropped or the second ones."""
    dropout_prob: float
    second_prob: float = 0.0
    """How often a sample's second caption stands for its first."""

    def draw(self, batch: Batch, rng: StepRng) -> Draws:
        """Draw noise, noise level, which captions are dropped, and which are the second ones."""
        latent = batch["latent"]
        draws = {
            "noise": rng.local.normal(*latent.shape),
            "level": noise_level(rng.local.normal(len(latent))),
            "is_dropped": rng.local.uniform(len(latent)) < self.dropout_prob,
        }
        if self.second_prob:
            draws["is_second"] = rng.local.uniform(len(latent)) < self.second_prob
        return draws

    def __call__(self, network: Network, batch: Batch, draws: Draws) -> Losses:
        """Compute the loss; `latent` is normalized."""
        data, level = batch["latent"], draws["level"]
        sigma = per_sample(level, data)
        x_t = (1 - sigma) * data + sigma * draws["noise"]
        text = self.text(batch, draws)
        velocity = network(x_t, level * TIMESTEP_SCALE, text=text).output.float()
        mse = (x_t - sigma * velocity - data).square().mean()
        return Losses(total=mse, terms={"data_mse": mse})
