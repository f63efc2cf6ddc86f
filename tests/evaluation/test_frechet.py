"""Laws of the Frechet distance."""

import pytest
import torch
from torch import Tensor

from udiff.evaluation.frechet import (
    FeatureStatistics,
    feature_statistics,
    frechet_distance,
    principal_components,
    statistics_distance,
)


def _features(num_samples: int, dim: int, *, seed: int = 0) -> Tensor:
    return torch.randn(num_samples, dim, generator=torch.Generator().manual_seed(seed))


def test_a_set_has_no_distance_to_itself() -> None:
    features = _features(50, 20)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-8)


def test_a_shift_is_its_squared_length() -> None:
    features = _features(200, 5)
    assert frechet_distance(features, features + 2) == pytest.approx(20, rel=1e-6)


def test_covariances_that_commute_have_the_distance_of_their_roots() -> None:
    mean, a, b = torch.zeros(3).double(), torch.tensor([1.0, 4, 9]), torch.tensor([4.0, 4, 1])
    pair = [FeatureStatistics(mean, variance.double().diag()) for variance in (a, b)]
    assert statistics_distance(*pair) == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()))


def test_it_does_not_depend_on_the_axes() -> None:
    a, b = _features(100, 8), 2 * _features(80, 8, seed=1) + 1
    turn = torch.linalg.qr(_features(8, 8, seed=2)).Q
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-5)


def test_fewer_samples_than_features_are_no_trouble() -> None:
    distance = frechet_distance(_features(10, 64), _features(12, 64, seed=1))
    assert distance > 0
    assert distance == pytest.approx(frechet_distance(_features(12, 64, seed=1), _features(10, 64)))


def test_principal_components_keep_the_largest_variances_first() -> None:
    features = _features(500, 4) * torch.tensor([1.0, 5.0, 0.1, 2.0])
    projected = principal_components(features, 2)(features)
    variances = feature_statistics(projected).covariance.diag()
    assert variances[0] == pytest.approx(25, rel=0.2)
    assert variances[1] == pytest.approx(4, rel=0.2)
    assert projected.mean(0).abs().max() < 1e-6


def test_all_components_keep_the_distance() -> None:
    a, b = _features(100, 6), _features(100, 6, seed=1) + 1
    project = principal_components(a, 6)
    assert frechet_distance(project(a), project(b)) == pytest.approx(frechet_distance(a, b))


def test_too_many_components_and_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="have 1 to 9 principal components, got 10"):
        principal_components(_features(10, 64), 10)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        feature_statistics(_features(1, 4))
