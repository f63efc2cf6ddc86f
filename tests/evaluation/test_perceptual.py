"""LPIPS with its real weights, PSNR, SSIM, and the foundation models' grids."""

import pytest
import torch
from timm.models import VisionTransformer
from torch.nn.functional import avg_pool2d

from jobs.fetch_weights import fetch_lpips
from tests.made import draw_pictures
from udiff.autoencoders.perceptual import LPIPS, load_lpips
from udiff.autoencoders.pixels import to_pixels
from udiff.encoders.foundation import FoundationModel, load_foundation
from udiff.evaluation.reconstruction import evaluation_crop, psnr, ssim
from udiff.weights import WeightsError


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return load_lpips(fetch_lpips())


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return to_pixels(torch.from_numpy(draw_pictures(4, 48)))


def test_the_weights_are_those_of_torchvision(lpips):
    first = lpips.net.slice1[0].weight[0, 0, 0]
    torch.testing.assert_close(first, torch.tensor([-0.5537, 0.1427, 0.5290]), atol=1e-4, rtol=0)


def test_a_picture_is_nearest_to_itself_and_nearer_to_its_blur_than_to_another(lpips, pixels):
    same, blurred, other = (
        lpips(pixels, p).flatten() for p in (pixels, avg_pool2d(pixels, 3, 1, 1), pixels.roll(1, 0))
    )
    assert not same.any()
    assert (blurred > 0).all()
    assert (other > blurred).all()


def test_lpips_passes_gradients_and_never_learns(lpips, pixels):
    moved = avg_pool2d(pixels, 3, 1, 1).requires_grad_()
    lpips(pixels, moved).sum().backward()
    assert moved.grad is not None
    assert moved.grad.any()
    assert not any(p.requires_grad for p in lpips.parameters())
    assert not lpips.training


def test_a_file_of_other_weights_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"missing keys .*net.slice1.0.weight.*\['weight'\]"):
        load_lpips(tmp_path / "other.pt")


def test_psnr_of_one_level_off():
    image = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    expected = torch.full((2,), 48.1308, dtype=torch.float64)
    torch.testing.assert_close(psnr(image, image + 1), expected, atol=1e-4, rtol=0)
    assert psnr(image, image).isinf().all()


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise(pixels):
    torch.testing.assert_close(ssim(pixels, pixels), torch.ones(4))
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    little, much = (ssim(pixels, pixels + k * noise) for k in (0.1, 0.5))
    assert (little < 1).all()
    assert (little > much).all()


@pytest.mark.parametrize("shape", [(40, 60, 3), (60, 40, 3), (32, 32, 3)])
def test_the_evaluation_crop_is_the_middle(shape):
    image = torch.zeros(shape, dtype=torch.uint8)
    image[shape[0] // 2, shape[1] // 2] = 255
    cropped = evaluation_crop(image, 32)
    row, column = divmod(int(cropped[0].argmax()), 32)
    assert cropped.shape == (3, 32, 32)
    assert abs(row - 16) <= 1
    assert abs(column - 16) <= 1


def _vit(patch_size: int) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=4 * patch_size, patch_size=patch_size, embed_dim=24, depth=1, num_heads=2,
        num_classes=0, dynamic_img_size=True,
    )  # fmt: skip


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
def test_foundation_features_are_one_per_sixteen_pixels(patch_size, size):
    model = FoundationModel(_vit(patch_size))
    pixels = torch.rand(2, 3, *size) * 2 - 1
    assert model(pixels).shape == (2, 24, size[0] // 16, size[1] // 16)


def test_normalizing_is_what_timm_expects():
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    expected = FoundationModel(_vit(16))(((pixels + 1) / 2 - mean) / std)
    torch.testing.assert_close(FoundationModel(_vit(16), normalize=True)(pixels), expected)


def test_a_foundation_model_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file nor a model"):
        load_foundation("mae", str(tmp_path / "nothing.safetensors"))
