"""Frechet distance between sets of features (FID, arXiv 1706.08500, equation 6)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class FeatureStatistics(NamedTuple):
    """Mean and covariance (of N - 1) of a set of features, float64."""

    mean: Float[Tensor, " dim"]
    covariance: Float[Tensor, "dim dim"]


def feature_statistics(features: Float[Tensor, "samples dim"]) -> FeatureStatistics:
    """Compute mean and covariance; there must be at least two samples.

    Raises:
        ValueError: there are fewer.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {len(features)}")
    features = features.double()
    return FeatureStatistics(features.mean(0), torch.atleast_2d(features.T.cov()))


def frechet_distance(
    features_a: Float[Tensor, "samples_a dim"], features_b: Float[Tensor, "samples_b dim"]
) -> float:
    """Compute the distance between two sets of features.

    It falls with the number of samples: compare only between equal numbers (and equal features).
    """
    return statistics_distance(feature_statistics(features_a), feature_statistics(features_b))


def statistics_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Compute |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr sqrt(A B).

    The eigenvalues of A B are those of the symmetric sqrt(A) B sqrt(A), so that no root of a
    general matrix is needed, and none can fail where a covariance is singular.
    """
    root = _symmetric_root(a.covariance)
    eigenvalues = torch.linalg.eigvalsh(root @ b.covariance @ root)
    cross = eigenvalues.clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum()
    return float(distance + a.covariance.trace() + b.covariance.trace() - 2 * cross)


@dataclass(frozen=True)
class Projection:
    """Linear map of features onto a few directions."""

    mean: Float[Tensor, " dim"]
    components: Float[Tensor, "k dim"]
    """Orthonormal, largest variance first."""

    def __call__(self, features: Float[Tensor, "samples dim"]) -> Float[Tensor, "samples k"]:
        """Project, in float64."""
        return (features.double() - self.mean) @ self.components.T


def principal_components(reference: Float[Tensor, "samples dim"], k: int) -> Projection:
    """Fit the `k` directions of largest variance to a reference set.

    For sets too small for the covariance of all features (N below their number).

    Raises:
        ValueError: there are not `k` directions.
    """
    limit = min(len(reference) - 1, reference.shape[1])
    if not 1 <= k <= limit:
        raise ValueError(
            f"{len(reference)} references of {reference.shape[1]} features have 1 to {limit} "
            f"principal components, got {k}"
        )
    mean, covariance = feature_statistics(reference)
    vectors = torch.linalg.eigh(covariance).eigenvectors
    return Projection(mean, vectors[:, -k:].T.flip(0))


def _symmetric_root(matrix: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
