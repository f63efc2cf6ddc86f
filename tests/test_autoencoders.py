"""The adapter over diffusers' autoencoder."""

from fractions import Fraction

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from udiff.autoencoders.kl import KLAutoencoder, Moments, load_diffusers_autoencoder
from udiff.autoencoders.ldm import LDMArchitecture, LDMAutoencoder
from udiff.autoencoders.pixels import to_pixels, to_uint8
from udiff.autoencoders.tiles import map_tiles


def small(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    options = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    return AutoencoderKL(**{**options, **changes})


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_diffusers_folder_loads_with_its_scaling(tmp_path, pipeline):
    model = small(scaling_factor=0.25, shift_factor=0.5)
    model.save_pretrained(tmp_path / "vae" if pipeline else tmp_path)
    loaded = load_diffusers_autoencoder(str(tmp_path))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = model.encode(pixels).latent_dist
        decoded = model.decode(expected.mean).sample
    moments = loaded.encode_moments(pixels)
    torch.testing.assert_close(moments.mean, expected.mean, atol=1e-5, rtol=1e-5)
    normalized = loaded.normalize(moments.mean)
    torch.testing.assert_close(normalized, (moments.mean - 0.5) * 0.25)
    torch.testing.assert_close(loaded.decode(normalized), decoded, atol=1e-4, rtol=1e-4)


def test_a_path_to_nothing_says_what_could_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a bundle, nor a local diffusers folder"):
        load_diffusers_autoencoder(str(tmp_path / "nothing"))


def test_the_fingerprint_follows_weights_and_configuration():
    one = KLAutoencoder(small()).fingerprint()
    assert one == KLAutoencoder(small()).fingerprint()
    assert one != KLAutoencoder(small(act_fn="relu")).fingerprint()
    changed = small()
    with torch.no_grad():
        changed.encoder.conv_in.bias[0] += 1e-6
    assert one != KLAutoencoder(changed).fingerprint()


def test_scaling_is_no_part_of_what_encoding_depends_on():
    assert (
        KLAutoencoder(small(scaling_factor=0.3)).fingerprint()
        == KLAutoencoder(small()).fingerprint()
    )


def test_statistics_of_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match=r"autoencoder.mean has 3 values"):
        KLAutoencoder(small()).set_statistics((0.0,) * 3, (1.0,) * 3)


def test_kl_is_that_of_diffusers():
    model = KLAutoencoder(small())
    pixels = torch.rand(2, 3, 16, 16)
    theirs = model.model.encode(pixels).latent_dist.kl()  # summed over the latent
    ours = model.encode_moments(pixels).kl()
    assert ours.item() == pytest.approx(theirs.mean().item() / (4 * 8 * 8), rel=1e-5)


def test_sampled_moments_have_their_mean_and_spread():
    moments = Moments(torch.full((1, 1, 300, 300), 2.0), torch.full((1, 1, 300, 300), -2.0))
    sample = moments.sample(torch.randn(1, 1, 300, 300, generator=torch.Generator().manual_seed(0)))
    assert sample.mean().item() == pytest.approx(2, abs=0.01)
    assert sample.std().item() == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.02)


@given(st.lists(st.integers(0, 255), min_size=3, max_size=3))
def test_pixels_and_levels_are_one_to_one(levels):
    image = torch.tensor(levels, dtype=torch.uint8).view(1, 1, 1, 3)
    assert torch.equal(to_uint8(to_pixels(image)), image)


def test_values_outside_are_clipped():
    assert to_uint8(torch.tensor([-5.0, 5.0]).view(1, 2, 1, 1)).flatten().tolist() == [0, 255]


# ---------------------------------------------------------------- large pictures


LEVELS = 3


def theirs() -> AutoencoderKL:
    return small(
        block_out_channels=(8,) * LEVELS,
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
    )


def ours() -> LDMAutoencoder:
    torch.manual_seed(0)
    return LDMAutoencoder(LDMArchitecture(8, (1,) * LEVELS, 1, 4, 4, norm_groups=4))


def texture(height: int, width: int) -> torch.Tensor:
    """Draw two pictures that look the same everywhere."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    phases = torch.arange(6).view(2, 3, 1, 1)
    return ((2 * y + 3 * x) * torch.pi / 8 + phases).sin()


@torch.no_grad()
def there_and_back(autoencoder: KLAutoencoder, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    moments = autoencoder.encode_moments(pixels)
    latent = autoencoder.normalize(pixels.mean(1, keepdim=True)[..., ::4, ::4].repeat(1, 4, 1, 1))
    return moments.mean, moments.logvar, autoencoder.decode(latent)


@pytest.mark.parametrize("model", [theirs, ours])
def test_a_sliced_batch_is_each_picture_alone(model):
    autoencoder, pixels = KLAutoencoder(model()), texture(16, 16)
    alone = [there_and_back(autoencoder, each) for each in pixels.split(1)]
    autoencoder.save_memory(sliced=True)
    sliced = there_and_back(autoencoder, pixels)
    for ours, parts in zip(sliced, zip(*alone, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(parts))


@pytest.mark.parametrize("model", [theirs, ours])
@pytest.mark.parametrize("size", [(128, 128), (64, 128), (112, 96)])
def test_tiles_are_near_the_whole(model, size):
    autoencoder, pixels = KLAutoencoder(model()), texture(*size)
    whole = there_and_back(autoencoder, pixels)
    autoencoder.save_memory(tile=64)
    for tiled, expected in zip(there_and_back(autoencoder, pixels), whole, strict=True):
        assert tiled.shape == expected.shape
        # Group norm and attention see a tile, and convolutions zeros at its edges, which random
        # weights make much of (trained ones are compared in test_vavae). Misplaced tiles give 0.
        pair = torch.stack([tiled.flatten(), expected.flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.75


@pytest.mark.parametrize("model", [theirs, ours])
def test_what_fits_into_a_tile_is_not_cut(model):
    autoencoder, pixels = KLAutoencoder(model()), texture(48, 48)
    whole = there_and_back(autoencoder, pixels)
    autoencoder.save_memory(tile=48)
    assert all(map(torch.equal, there_and_back(autoencoder, pixels), whole))


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([4, 8, 12]))
def test_tiles_of_a_local_map_are_the_whole(height, width, side):
    x = torch.randn(1, 2, 2 * height, 2 * width)
    for network, scale in ((lambda x: 3 * x, Fraction(1)), (doubled, Fraction(2))):
        tiled = map_tiles(network, x, side=side, scale=scale)
        torch.testing.assert_close(tiled, network(x))


def doubled(x: torch.Tensor) -> torch.Tensor:
    return interpolate(x, scale_factor=2.0)


def test_tiles_bound_the_memory_of_a_large_picture():
    seen = []
    autoencoder = KLAutoencoder(ours())
    autoencoder.model.encoder.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
    autoencoder.save_memory(sliced=True, tile=32)
    there_and_back(autoencoder, texture(96, 80))
    assert set(seen) == {(1, 3, 32, 32)}


def test_a_tile_of_no_whole_latents_is_refused():
    with pytest.raises(
        ValueError, match="tile must be a multiple of 8, 4 latents of this autoencoder, got 20"
    ):
        KLAutoencoder(small()).save_memory(tile=20)
