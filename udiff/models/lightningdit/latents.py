"""Statistics of latents as the official code keeps them (`latents_stats.pt`)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from udiff.weights import WeightsError


def measure_latents(latents: Float[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
    """Compute what `latents_stats.pt` holds: mean and unbiased std, each 1 x channels x 1 x 1."""
    axes = (0, 2, 3)
    return {"mean": latents.mean(axes, keepdim=True), "std": latents.std(axes, keepdim=True)}


def statistics_keys(statistics: Mapping[str, Tensor]) -> dict[str, Any]:
    """Turn the content of `latents_stats.pt` into recipe keys; a converted model needs them.

    Raises:
        WeightsError: it holds something else.
    """
    if set(statistics) != {"mean", "std"}:
        raise WeightsError(f"latent statistics are mean and std, got {sorted(statistics)}")
    values = {name: tensor.flatten().tolist() for name, tensor in statistics.items()}
    return {"autoencoder": {"normalization": "channels", **values}}
