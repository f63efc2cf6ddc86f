"""A run of all four flows learns: every flow's loss falls."""

import numpy as np
import pytest

from tests.models.versatile_made import make_versatile, small_recipe
from tests.training.test_trainer import train
from udiff.training.log import read_metrics


@pytest.mark.long
def test_all_four_losses_fall(tmp_path):
    make_versatile(tmp_path)
    recipe = small_recipe(
        tmp_path,
        "train.images=1280",
        "train.checkpoint_every=1000",
        "optimizer.lr=2e-3",
    )
    train(recipe, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    for flow in recipe.flows:
        losses = [row[f"{flow}_mse"] for row in rows]
        assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5]), flow
