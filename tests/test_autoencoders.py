"""The adapter over diffusers' autoencoder."""

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st

from udiff.autoencoders.kl import KLAutoencoder, Moments, load_diffusers_autoencoder
from udiff.autoencoders.pixels import to_pixels, to_uint8


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
