"""CLIP's contexts, with a tiny random model and the real byte pairs."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.made import draw_pictures, save_clip
from udiff.encoders.clip import CLIPContexts, load_clip
from udiff.encoders.text import TextEncoder
from udiff.settings import EncoderSettings


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> CLIPContexts:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return load_clip(EncoderSettings(path=str(folder)))


def test_it_is_a_text_encoder(clip):
    assert isinstance(clip, TextEncoder)


def test_texts_are_cut_into_the_published_byte_pairs(clip):
    ids = clip.tokenize(["a photo of a cat", ""], 9)
    assert ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407, 49407]
    assert clip.count_tokens(ids).tolist() == [7, 2]
    assert clip.tokenize(["a photo of a cat " * 9], 9)[0, -1] == 49407


def test_the_pooled_token_has_length_one(clip):
    ids = clip.tokenize(["a cat", "two dogs on a mat"], 20)
    states, counts = clip.encode(ids), clip.count_tokens(ids)
    ends = states[torch.arange(2), counts - 1]
    torch.testing.assert_close(ends.norm(dim=-1), torch.ones(2))
    tokens = clip.encode_image(clip.prepare([Image.new("RGB", (30, 40), "red")]))
    assert tokens.shape == (1, clip.num_image_tokens, clip.width)
    torch.testing.assert_close(tokens[:, 0].norm(dim=-1), torch.ones(1))


def test_a_mask_that_keeps_all_changes_nothing_and_one_that_keeps_none_leaves_nothing(clip):
    pixels = clip.prepare([Image.fromarray(draw_pictures(1, 40)[0])])
    whole = clip.encode_image(pixels)
    assert torch.equal(clip.encode_image(pixels, torch.ones(1, 1, 7, 9)), whole)
    assert not clip.encode_image(pixels, torch.zeros(1, 1, 7, 9)).any()


@pytest.mark.parametrize("size", [24, 32, 61])
def test_batches_are_prepared_like_single_pictures(clip, size):
    pictures = draw_pictures(3, size)
    one_by_one = clip.prepare([Image.fromarray(picture) for picture in pictures])
    together = clip.prepare_batch(torch.from_numpy(np.ascontiguousarray(pictures)))
    level = 1 / 255 / 0.26
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1.05 * level)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"clip\.path"):
        load_clip(EncoderSettings(path=str(tmp_path / "nothing")))
