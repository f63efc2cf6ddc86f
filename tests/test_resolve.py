"""A recipe and a cache that do not belong together are told apart before training."""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.made import save_autoencoder, write_latents
from udiff.models.ddt.recipe import Recipe
from udiff.recipe import load_recipe
from udiff.resolve import resolve


class _WithTexts(Recipe):
    """A family whose cache must hold texts of a certain encoder."""

    encoder: str = ""

    def cache_identity(self) -> Mapping[str, Mapping[str, Any]]:
        return {"latent": {"dtype": self.encoder}}


@pytest.fixture
def recipe(tmp_path):
    save_autoencoder(tmp_path / "autoencoder")
    write_latents(tmp_path / "latents", autoencoder=tmp_path / "autoencoder", rows=20)
    overrides = [
        f"data.cache={tmp_path / 'latents'}",
        f"autoencoder.path={tmp_path / 'autoencoder'}",
    ]
    return load_recipe("ddt/debug", overrides)


def test_a_cache_of_the_recipes_own_encoders_is_taken(recipe):
    assert resolve(recipe).manifest.num_rows == 20


def test_a_column_of_another_encoder_is_refused_by_name(recipe):
    wanting = _WithTexts(**recipe.model_dump(), encoder="abc")
    with pytest.raises(ValueError, match=r'latent\.dtype is missing, wanted "abc"'):
        resolve(wanting)


def test_another_autoencoder_is_refused_by_name(recipe, tmp_path):
    save_autoencoder(tmp_path / "other", seed=2)
    settings = recipe.autoencoder.model_copy(update={"path": str(tmp_path / "other")})
    with pytest.raises(ValueError, match=r"another autoencoder than autoencoder\.path"):
        resolve(recipe.model_copy(update={"autoencoder": settings}))
