"""Laws of Inception score, precision and recall."""

import pytest
import torch
from torch import Tensor

from udiff.evaluation.inception_score import class_probabilities, inception_score
from udiff.evaluation.precision_recall import (
    manifold_members,
    manifold_radii,
    official_distances,
    precision_recall,
    realism,
    squared_distances,
)


def _cloud(num_samples: int, *, seed: int, at: float = 0.0) -> Tensor:
    return torch.randn(num_samples, 8, generator=torch.Generator().manual_seed(seed)) + at


def test_certain_and_balanced_classes_score_their_number() -> None:
    assert inception_score(torch.eye(10).repeat(4, 1)) == pytest.approx(10)


def test_samples_that_are_all_alike_score_1() -> None:
    assert inception_score(torch.full((20, 5), 0.2)) == pytest.approx(1)


def test_a_short_last_split_counts_as_much() -> None:
    probabilities = torch.cat([torch.eye(4), torch.eye(4)[:1]])
    assert inception_score(probabilities, split_size=4) == pytest.approx((4 + 1) / 2)


def test_probabilities_are_of_the_logits_without_bias() -> None:
    probabilities = class_probabilities(torch.zeros(2, 3), torch.randn(3, 4))
    torch.testing.assert_close(probabilities, torch.full((2, 4), 0.25))


def test_a_set_covers_itself() -> None:
    features = _cloud(60, seed=0)
    assert precision_recall(features, features, distances=squared_distances) == (1, 1)


def test_far_sets_share_nothing() -> None:
    assert precision_recall(_cloud(60, seed=0), _cloud(50, seed=1, at=50.0)) == (0, 0)


def test_one_good_picture_over_and_over_is_precise_but_recalls_little() -> None:
    reference = _cloud(100, seed=0)
    samples = reference[:1] + 0.01 * _cloud(50, seed=1)
    result = precision_recall(reference, samples, distances=squared_distances)
    assert result.precision == 1
    assert result.recall <= 0.02


def test_blocks_do_not_matter_in_one_precision() -> None:
    reference, samples = _cloud(50, seed=0), _cloud(70, seed=1)
    radii = [manifold_radii(x, distances=squared_distances) for x in (reference, samples)]
    small = manifold_radii(samples, distances=squared_distances, block=16)
    torch.testing.assert_close(small, radii[1], rtol=1e-5, atol=1e-5)
    whole = manifold_members(reference, radii[0], samples, radii[1], distances=squared_distances)
    parts = manifold_members(
        reference,
        radii[0],
        samples,
        radii[1],
        distances=squared_distances,
        row_block=7,
        column_block=11,
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_distances_that_float16_cannot_hold_are_computed_in_float32() -> None:
    near, far = _cloud(5, seed=0), 1000 * _cloud(5, seed=1)
    assert torch.equal(official_distances(far, far), squared_distances(far, far))
    assert not torch.equal(official_distances(near, near), squared_distances(near, near))


def test_realism_is_highest_at_a_reference() -> None:
    reference = _cloud(40, seed=0)
    radii = manifold_radii(reference, distances=squared_distances)
    judged = realism(reference, radii, torch.stack([reference[3], reference[3] + 9]))
    assert judged.nearest[0] == 3
    assert judged.is_near.tolist() == [True, False]
    assert judged.score[0] > 1 > judged.score[1]
