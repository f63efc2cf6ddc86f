"""DINOv2 as a teacher, with a tiny random vision transformer in its place."""

import pytest
import torch
from timm.models import VisionTransformer

from udiff.diffusion.alignment import Projector, alignment_loss, resize_tokens
from udiff.diffusion.compose import ImageTeacher
from udiff.encoders.dinov2 import DINOv2, load_dinov2, prepare_image


def _encoder() -> DINOv2:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=70, patch_size=14, embed_dim=24, depth=2, num_heads=2, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip
    return DINOv2(model)


def test_a_picture_of_256_has_as_many_tokens_as_its_latent():
    assert prepare_image(torch.rand(1, 3, 256, 512)).shape == (1, 3, 224, 448)
    assert _encoder()(torch.rand(2, 3, 256, 256)).shape == (2, 16 * 16, 24)


def test_tokens_are_normalized_and_without_the_class_token():
    encoder = _encoder()
    image = torch.rand(2, 3, 64, 96)
    found = encoder(image)
    expected = encoder.model.forward_features(prepare_image(image))[:, 1:]
    assert torch.equal(found, expected)
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 4 * 6), atol=1e-5, rtol=0)


def test_the_teacher_reads_pictures_and_learns_nothing():
    encoder = _encoder()
    loaded = []
    teacher = ImageTeacher(lambda: loaded.append(1) or encoder)
    image = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    first, again = (teacher({"image": image}) for _ in range(2))
    assert torch.equal(first, again)
    assert len(loaded) == 1
    assert not first.requires_grad
    assert torch.equal(first, encoder(image.permute(0, 3, 1, 2) / 255))


def test_a_teacher_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_dinov2(str(tmp_path / "missing.safetensors"))


def test_alignment_is_zero_for_features_of_the_same_direction():
    features = torch.randn(2, 4, 8)
    assert alignment_loss(3 * features, features).item() == pytest.approx(0, abs=1e-6)
    assert alignment_loss(-features, features).item() == pytest.approx(2, abs=1e-6)


def test_features_are_resized_on_a_grid_of_the_latents_shape():
    ramp = torch.arange(8.0).repeat(4, 1)  # 4 x 8, rising along its width
    resized = resize_tokens(ramp.reshape(1, 32, 1), 8, aspect=0.5).view(2, 4)
    torch.testing.assert_close(resized, torch.tensor([0.5, 2.5, 4.5, 6.5]).repeat(2, 1))
    with pytest.raises(ValueError, match="no grid"):
        resize_tokens(torch.randn(1, 7, 2), 16, aspect=1.0)


def test_a_projector_has_the_official_keys():
    keys = Projector(8, hidden_dim=8, feature_dim=4).state_dict()
    assert list(keys) == [f"{k}.{name}" for k in (0, 2, 4) for name in ("weight", "bias")]
