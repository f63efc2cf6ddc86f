"""Improved precision and recall of samples (arXiv 1904.06991), as ADM's evaluator computes them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Distances = Callable[[Tensor, Tensor], Float[Tensor, "rows columns"]]
"""Squared distances of every row of one set of features to every row of another."""

BLOCK = 10_000


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]."""

    precision: float
    """Of the samples, near a reference."""
    recall: float
    """Of the references, near a sample."""


class Realism(NamedTuple):
    """Each sample among the references."""

    is_near: Bool[Tensor, " samples"]
    nearest: Int[Tensor, " samples"]
    """Index of the nearest reference."""
    score: Float[Tensor, " samples"]
    """Largest ratio of a reference's radius and its distance, both squared."""


def squared_distances(
    a: Float[Tensor, "rows dim"], b: Float[Tensor, "columns dim"]
) -> Float[Tensor, "rows columns"]:
    """Compute max(|u|^2 - 2 u v + |v|^2, 0) in the dtype of the features."""
    return (_norms(a)[:, None] - 2 * (a @ b.T) + _norms(b)).clamp_min(0)


def official_distances(
    a: Float[Tensor, "rows dim"], b: Float[Tensor, "columns dim"]
) -> Float[Tensor, "rows columns"]:
    """Compute squared distances in float16 or, if that is not finite anywhere, in float32.

    As published: the choice depends on which rows and columns are computed together.
    """
    distances = squared_distances(a.half(), b.half()).float()
    return distances if distances.isfinite().all() else squared_distances(a.float(), b.float())


def manifold_radii(
    features: Float[Tensor, "samples dim"],
    *,
    k: int = 3,
    distances: Distances = official_distances,
    block: int = BLOCK,
) -> Float[Tensor, " samples"]:
    """Compute each sample's squared distance to its k-th nearest neighbor in the same set."""
    rows = [
        torch.cat([distances(row, column) for column in features.split(block)], dim=1)
        .kthvalue(k + 1, dim=1)  # the nearest is the sample itself
        .values
        for row in features.split(block)
    ]
    return torch.cat(rows)


def precision_recall(
    reference: Float[Tensor, "references dim"],
    samples: Float[Tensor, "samples dim"],
    *,
    k: int = 3,
    distances: Distances = official_distances,
) -> PrecisionRecall:
    """Compute both; the published figures have 10,000 references and 50,000 samples."""
    reference_radii = manifold_radii(reference, k=k, distances=distances)
    sample_radii = manifold_radii(samples, k=k, distances=distances)
    reference_is_near, sample_is_near = manifold_members(
        reference, reference_radii, samples, sample_radii, distances=distances
    )
    return PrecisionRecall(
        float(sample_is_near.double().mean()), float(reference_is_near.double().mean())
    )


def manifold_members(
    reference: Float[Tensor, "references dim"],
    reference_radii: Float[Tensor, " references"],
    samples: Float[Tensor, "samples dim"],
    sample_radii: Float[Tensor, " samples"],
    *,
    distances: Distances = official_distances,
    row_block: int = BLOCK,
    column_block: int = BLOCK,
) -> tuple[Bool[Tensor, " references"], Bool[Tensor, " samples"]]:
    """Find the references within a sample's radius, and the samples within a reference's."""
    reference_is_near = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    sample_is_near = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    for rows in _slices(len(reference), row_block):
        for columns in _slices(len(samples), column_block):
            block = distances(reference[rows], samples[columns])
            reference_is_near[rows] |= (block <= sample_radii[columns]).any(dim=1)
            sample_is_near[columns] |= (block <= reference_radii[rows, None]).any(dim=0)
    return reference_is_near, sample_is_near


def realism(
    reference: Float[Tensor, "references dim"],
    reference_radii: Float[Tensor, " references"],
    samples: Float[Tensor, "samples dim"],
    *,
    distances: Distances = official_distances,
) -> Realism:
    """Judge each sample by the references around it (arXiv 1904.06991, section 5)."""
    parts = []
    for columns in _slices(len(samples), BLOCK):
        block = distances(reference, samples[columns])
        parts.append(
            Realism(
                (block <= reference_radii[:, None]).any(dim=0),
                block.argmin(dim=0),
                (reference_radii[:, None] / (block + 1e-5)).max(dim=0).values,
            )
        )
    return Realism(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _slices(length: int, block: int) -> Iterator[slice]:
    return (slice(start, start + block) for start in range(0, length, block))


def _norms(features: Tensor) -> Tensor:
    return features.square().sum(dim=1)
