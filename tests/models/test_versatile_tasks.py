"""What Versatile Diffusion makes of requests: every flow, their mixes, edits; seeds and batches."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.made import draw_pictures, save_autoencoder, save_clip, save_optimus, save_random_bundle
from tests.models.versatile_made import CAPTIONS, small_recipe
from udiff.generate import Generator


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("versatile")
    save_autoencoder(folder / "autoencoder")
    save_clip(folder / "clip")
    save_optimus(folder / "optimus", CAPTIONS)
    save_random_bundle(folder / "bundle", small_recipe(folder, "sampling.num_steps=3"), seed=3)
    return folder / "bundle"


@pytest.fixture(scope="module")
def generator(bundle) -> Generator:
    return Generator(bundle, device="cpu")


def _picture(seed: int, size: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(draw_pictures(1, size, seed=seed)[0]).save(file, "PNG")
    return file.getvalue()


PICTURE, OTHER = _picture(1), _picture(2)
MASK = _picture(5)
REQUESTS = {
    "text_to_image": {"prompt": "a red apple"},
    "image_variation": {"image": PICTURE, "focus": 0.3, "fidelity": 0.4},
    "image_to_text": {"image": PICTURE, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "text_variation": {"prompt": "two cats"},
    "dual_context": {"image": PICTURE, "prompt": "a tree", "text_strength": 0.3},
    "multi_context": {
        "images": [{"image": PICTURE, "mask": MASK, "weight": 0.7}, {"image": OTHER, "focus": 0.8}],
        "prompt": "a mat",
        "text_strength": 0.4,
    },
    "image_text_image": {"image": PICTURE, "negative": "a bird", "positive": "a cat"},
}


def test_every_task_has_a_request_here(generator):
    assert set(generator.tasks) == set(REQUESTS)


@pytest.mark.parametrize("task", REQUESTS)
def test_seeds_decide_and_batch_mates_do_not(generator, task):
    requests = [{**REQUESTS[task], "seed": seed} for seed in (1, 2, 1)]
    first, second, again = generator.generate(requests, task=task)
    [alone] = generator.generate(requests[:1], task=task)
    if generator.tasks[task].output == "text":
        assert all(isinstance(text, str) for text in (first, second))
        assert first == again == alone
        return
    assert first.shape == (32, 32, 3)
    assert np.abs(first.astype(float) - second).mean() > 1
    # Another batch size moves the last bits, and so the level of what lies between two.
    assert np.abs(first.astype(int) - again).max() <= 1
    assert np.abs(first.astype(int) - alone).max() <= 1


@pytest.mark.parametrize("num_steps", [1, 3, 9, 50])
def test_every_number_of_steps_samples(generator, num_steps):
    for task in ("text_to_image", "text_variation"):
        request = {**REQUESTS[task], "num_steps": num_steps}
        assert len(generator.generate([request], task=task)) == 1


def test_full_fidelity_returns_the_picture(generator):
    [picture] = generator.generate([{"image": PICTURE, "fidelity": 1}], task="image_variation")
    wanted = Image.open(io.BytesIO(PICTURE)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(picture, np.array(wanted))


def test_the_unconditional_pictures_are_a_named_choice(generator):
    from udiff.models.versatile.contexts import Contexts

    clip = generator.tasks["text_to_image"].start.__self__._contexts._clip
    cpu = torch.device("cpu")
    nulls = {
        rule: Contexts(clip, rule).null("image", data="image", device=cpu)
        for rule in ("zeros", "gray", "near_black")
    }
    assert not nulls["zeros"].any()
    assert not torch.equal(nulls["gray"], nulls["near_black"])
    black = Contexts(clip, "zeros").null("image", data="text", device=cpu)
    torch.testing.assert_close(black, nulls["near_black"], rtol=0.2, atol=0.2)
    picture = Contexts(clip, "zeros").picture(Image.new("RGB", (9, 9)), cpu)
    torch.testing.assert_close(black, picture)


def test_no_weight_leaves_nothing_of_a_picture(generator):
    """A picture of weight 0 beside another: where it is does not matter, what it is neither."""
    task = "multi_context"
    kept = {"image": PICTURE}
    outputs = generator.generate(
        [{"images": [kept, {"image": image, "weight": 0}]} for image in (PICTURE, OTHER)], task=task
    )
    assert np.array_equal(*outputs)


@pytest.mark.parametrize(
    ("task", "request_", "message"),
    [
        ("image_variation", {"image": PICTURE, "focus": 1.5}, "focus"),
        ("image_variation", {"image": b"no picture"}, "format"),
        ("image_text_image", {"image": PICTURE}, "negative, positive or both"),
        ("multi_context", {"images": []}, "images"),
        ("text_to_image", {"prompt": "a", "num_steps": 1001}, "num_steps"),
    ],
)
def test_a_request_that_cannot_be_answered_is_named(generator, task, request_, message):
    with pytest.raises(ValueError, match=message):
        generator.generate([request_], task=task)
