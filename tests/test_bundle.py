"""Bundles: whole or not there, strict, and complete by themselves."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.made import save_autoencoder, save_random_bundle
from udiff.bundle import load_autoencoder, load_bundle, load_latent_decoder, save_bundle
from udiff.generate import Generator
from udiff.recipe import load_recipe
from udiff.weights import WeightsError

SMALL = "network={dim: 32, num_heads: 2, num_blocks: 3, num_encoder_blocks: 2}"
STATISTICS = ("autoencoder.mean=[1, 2, 3, 4]", "autoencoder.std=[0.5, 1, 2, 4]")


@pytest.fixture
def bundle(tmp_path) -> Path:
    save_autoencoder(tmp_path / "vae")
    recipe = load_recipe("ddt/debug", [SMALL, *STATISTICS, f"autoencoder.path={tmp_path / 'vae'}"])
    save_random_bundle(tmp_path / "bundle", recipe, seed=2)
    return tmp_path / "bundle"


def test_what_is_saved_is_loaded(bundle):
    saved = load_file(bundle / "weights.safetensors")
    loaded = torch.nn.ModuleDict(load_bundle(bundle).system.modules).state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_a_bundle_needs_nothing_from_where_it_was_made(bundle, tmp_path):
    request = {"label": 3, "seed": 5, "num_steps": 3}
    before = Generator(bundle).generate([request])
    shutil.rmtree(tmp_path / "vae")
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(str(bundle), moved)
    assert np.array_equal(Generator(moved).generate([request]), before)


def test_the_decoder_undoes_the_statistics_of_training(bundle):
    decoder = load_latent_decoder(load_bundle(bundle).recipe)
    raw = torch.randn(2, 4, 8, 8)
    undone = decoder.decode(decoder.normalize(raw))
    torch.testing.assert_close(undone, decoder.model.decode(raw).sample, atol=1e-4, rtol=1e-4)
    assert decoder.latent_mean.flatten().tolist() == [1, 2, 3, 4]


def test_keys_that_are_missing_or_unknown_are_listed(bundle):
    weights = load_file(bundle / "weights.safetensors")
    weights["denoiser.surplus"] = weights.pop("denoiser.blocks.0.norm1.weight")
    save_file(weights, bundle / "weights.safetensors")
    message = r"missing keys \['denoiser.blocks.0.norm1.weight'\], unknown .*'denoiser.surplus'"
    with pytest.raises(WeightsError, match=message):
        load_bundle(bundle)


def test_a_save_that_fails_leaves_the_bundle_that_was_there(bundle):
    before = {file.name: file.read_bytes() for file in bundle.iterdir() if file.is_file()}
    recipe = load_bundle(bundle).recipe
    with pytest.raises(AttributeError):
        save_bundle(bundle, recipe, {"broken": None}, about="")  # type: ignore[dict-item]
    assert {f.name: f.read_bytes() for f in bundle.iterdir() if f.is_file()} == before
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".")] == []


def test_a_later_save_replaces_the_whole(bundle):
    recipe = load_bundle(bundle).recipe
    save_random_bundle(bundle, recipe, seed=3)
    save_random_bundle(bundle.parent / "other", recipe, seed=3)
    assert (bundle / "weights.safetensors").read_bytes() == (
        bundle.parent / "other" / "weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("missing", ["weights.safetensors", "recipe.yaml"])
def test_a_folder_that_is_no_bundle_says_what_it_lacks(bundle, missing):
    (bundle / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"it has no {missing}"):
        load_bundle(bundle)


def test_a_denoiser_is_no_autoencoder(bundle):
    with pytest.raises(ValueError, match="is a bundle of family ddt, not of an autoencoder"):
        load_autoencoder(str(bundle))


def test_an_autoencoder_draws_no_pictures(tmp_path):
    save_autoencoder(tmp_path / "vae")
    with pytest.raises(ValueError, match="of family kl_autoencoder, without a task"):
        Generator(tmp_path / "vae")
