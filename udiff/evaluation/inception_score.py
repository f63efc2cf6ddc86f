"""Inception score (arXiv 1606.03498)."""

import torch
from jaxtyping import Float
from torch import Tensor


def class_probabilities(
    features: Float[Tensor, "samples dim"], weight: Float[Tensor, "dim classes"]
) -> Float[Tensor, "samples classes"]:
    """Apply the classifier's last layer, without its bias as in the published scores."""
    return (features @ weight).softmax(dim=1)


def inception_score(
    probabilities: Float[Tensor, "samples classes"], *, split_size: int = 5000
) -> float:
    """Compute exp of the mean KL(p || mean p) in consecutive splits, averaged over the splits.

    A last split that is shorter counts as much as the others.
    """
    scores = [_score(split) for split in probabilities.split(split_size)]
    return float(torch.stack(scores).mean())


def _score(probabilities: Float[Tensor, "samples classes"]) -> Float[Tensor, ""]:
    marginal = probabilities.mean(dim=0, keepdim=True)
    # xlogy is 0 at probability 0, where p log(p / mean) would not be a number.
    entropy = torch.special.xlogy(probabilities, probabilities).sum(dim=1)
    cross = torch.special.xlogy(probabilities, marginal).sum(dim=1)
    return (entropy - cross).mean().exp()
