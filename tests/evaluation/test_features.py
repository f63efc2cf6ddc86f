"""Laws of the feature extractors."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from udiff.evaluation.features import load_features
from udiff.evaluation.inception import Inception, load_inception, resize_bilinear
from udiff.weights import WeightsError


def _images(num_images: int, *, size: int = 28) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, size, size, 3), generator=generator).byte()


def test_features_do_not_depend_on_the_other_pictures() -> None:
    extract, images = load_features("efficientnet_lite0", size=64), _images(3)
    together = extract(images)
    assert together.shape == (3, 1280)
    assert together.dtype == torch.float32
    torch.testing.assert_close(extract(images[1:2]), together[1:2], rtol=1e-3, atol=1e-4)


def test_an_unknown_extractor_is_named() -> None:
    with pytest.raises(ValueError, match=r"efficientnet_lite0.*got 'vgg'"):
        load_features("vgg", size=64)


def test_inception_reads_its_weights_file_and_nothing_else(tmp_path) -> None:
    torch.manual_seed(0)
    network = Inception()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    features = load_inception(tmp_path / "weights.pth")(_images(2))
    assert features.pool.shape == (2, 2048)
    assert features.spatial.shape == (2, 17 * 17 * 7)
    pool = load_features(str(tmp_path / "weights.pth"), size=64)(_images(2))
    assert torch.equal(pool, features.pool)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="missing keys"):
        load_inception(tmp_path / "other.pth")


def test_resizing_to_the_same_size_or_by_a_whole_number_keeps_the_pixels() -> None:
    pixels = _images(1).permute(0, 3, 1, 2).float()
    assert torch.equal(resize_bilinear(pixels, (28, 28)), pixels)
    assert torch.equal(resize_bilinear(pixels, (56, 84))[:, :, ::2, ::3], pixels)
    assert not torch.equal(resize_bilinear(pixels, (56, 56)), interpolate(pixels, scale_factor=2))
