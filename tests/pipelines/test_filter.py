"""What is let through by what a list, a language model or a network says of it."""

import json

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from pipelines.pictures import PicturesSettings
from pipelines.rows import Reason, Refusal, Rows
from pipelines.stages.filter import (
    Filters,
    ScoreSettings,
    check_language,
    check_metadata,
    check_size,
)
from pipelines.stages.score import Score, load_head
from udiff.weights import WeightsError


def _reason(stage, *arguments, **options):
    try:
        stage(*arguments, **options)
    except Refusal as refusal:
        return refusal.reason
    return None


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"pwatermark": 0.9, "punsafe": 0, "similarity": 0.4}, Reason.WATERMARK),
        ({"pwatermark": "0.1", "punsafe": 0.6, "similarity": 0.4}, Reason.UNSAFE),
        ({"NSFW": "UNLIKELY", "similarity": 0.4}, None),
        ({"NSFW": "UNSURE"}, Reason.UNSAFE),
        ({"clip_l14_similarity_score": 0.1}, Reason.UNLIKE_CAPTION),
        ({"similarity": 0.3, "clip_l14_similarity_score": 0.1}, None),
        ({"pwatermark": None, "punsafe": "nan", "similarity": [1]}, None),
    ],
)
def test_rows_are_refused_by_the_scores_of_their_list(metadata, reason):
    filters = Filters(max_watermark=0.5, max_unsafe=0.3, min_similarity=0.28)
    assert _reason(check_metadata, {"metadata": metadata}, filters=filters) == reason


def test_a_row_without_a_score_is_kept_or_dropped_as_asked():
    for unscored, reason in (("keep", None), ("drop", Reason.UNSCORED)):
        filters = Filters(max_unsafe=0.3, unscored=unscored)
        assert _reason(check_metadata, {"metadata": {}}, filters=filters) == reason
    assert _reason(check_metadata, {"metadata": {}}, filters=Filters(unscored="drop")) is None


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_what_is_no_finite_number_is_no_score(score):
    row = {"metadata": {"pwatermark": score}}
    for unscored, reason in (("keep", None), ("drop", Reason.UNSCORED)):
        filters = Filters(max_watermark=0.5, unscored=unscored)
        assert _reason(check_metadata, row, filters=filters) == reason


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1))
def test_a_score_at_its_limit_passes_and_above_does_not(score, limit):
    row = {"metadata": {"pwatermark": score}}
    refused = _reason(check_metadata, row, filters=Filters(max_watermark=limit)) is not None
    assert refused == (score > limit)


def test_captions_in_other_languages_are_refused():
    captions = {
        "a photo of a cat that sleeps on the sofa": None,
        "une photo d'un chat qui dort sur le canapé": Reason.LANGUAGE,
        "ein Foto von einer Katze,\ndie auf dem Sofa schläft": Reason.LANGUAGE,
        "": None,
    }
    for caption, reason in captions.items():
        assert _reason(check_language, {"caption": caption}, languages=("en",)) == reason


@given(st.integers(1, 500), st.integers(1, 500))
def test_aspect_does_not_depend_on_orientation(width, height):
    found = [
        _reason(check_size, {"width": w, "height": h}, max_aspect=2)
        for w, h in ((width, height), (height, width))
    ]
    wide = max(width, height) > 2 * min(width, height)
    assert found == [Reason.BAD_ASPECT if wide else None] * 2


# ---------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP as open_clip stores one, with random weights."""
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    folder = tmp_path_factory.mktemp("clip")
    described = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    model = open_clip.CLIP(16, config["vision_cfg"], config["text_cfg"])
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(16, 8), nn.Dropout(), nn.Linear(8, 1))
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file({f"layers.{key}": value for key, value in layers.state_dict().items()}, path)
    return layers.eval(), str(path)


def _rows(count=5):
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(count)]
    return [
        {"key": str(n), "source": str(n), "picture": picture, "caption": f"number {n}" if n else ""}
        for n, picture in enumerate(pictures)
    ]


def test_scores_are_those_of_open_clip_and_the_head(clip, head):
    layers, path = head
    rows = _rows()
    scored = Score(ScoreSettings(clip=clip, aesthetic_head=path), device="cpu")(Rows(kept=rows))
    model, preprocess = open_clip.create_model_from_pretrained(clip)
    model.eval()
    with torch.no_grad():
        images = model.encode_image(
            torch.stack([preprocess(row["picture"]) for row in rows]), normalize=True
        )
        tokens = open_clip.get_tokenizer(clip)([row["caption"] for row in rows])
        cosines = (images * model.encode_text(tokens, normalize=True)).sum(-1)
        likes = layers(images)[:, 0]
    found = np.array([[row["clip_score"], row["aesthetic"]] for row in scored.kept])
    assert np.isnan(found[0, 0])
    np.testing.assert_allclose(found[1:, 0], cosines[1:], atol=1e-5)
    np.testing.assert_allclose(found[:, 1], likes, atol=1e-5)


def test_pictures_below_a_limit_are_refused_with_their_score(clip, head):
    rows = _rows()
    every = Score(ScoreSettings(clip=clip, aesthetic_head=head[1]), device="cpu")(Rows(kept=rows))
    limit = float(np.median([row["aesthetic"] for row in every.kept])) + 1e-6
    settings = ScoreSettings(clip=clip, aesthetic_head=head[1], min_aesthetic=limit)
    found = Score(settings, device="cpu")(Rows(kept=rows))
    assert len(found.kept) == 2
    assert {row.reason for row in found.rejected} == {Reason.UGLY}
    settings = ScoreSettings(clip=clip, min_clip_score=1.0)
    found = Score(settings, device="cpu")(Rows(kept=rows))
    assert [row["key"] for row in found.kept] == ["0"]  # it has no caption to be unlike
    assert {row.reason for row in found.rejected} == {Reason.UNLIKE_CAPTION}


def test_a_head_that_is_none_is_refused(tmp_path):
    for weights in (
        {"a.weight": torch.zeros(4, 8), "a.bias": torch.zeros(4)},
        {"0.weight": torch.zeros(4, 8), "0.bias": torch.zeros(4), "1.weight": torch.zeros(1, 5)},
        {"a.weight": torch.zeros(1, 8)},
        {"logit_scale": torch.zeros(1)},
    ):
        save_file(weights, tmp_path / "head.safetensors")
        with pytest.raises(WeightsError, match=r"head\.safetensors"):
            load_head(str(tmp_path / "head.safetensors"))


def test_settings_that_lack_something_are_refused():
    with pytest.raises(ValidationError, match="set clip"):
        ScoreSettings(min_clip_score=0.2)
    with pytest.raises(ValidationError, match="set aesthetic_head"):
        ScoreSettings(clip="ViT-B-32:openai", min_aesthetic=5)
    with pytest.raises(ValidationError, match="blueish"):
        PicturesSettings(input="a", output="b", size=8, background="blueish")
    with pytest.raises(ValueError, match="NAME:WEIGHTS"):
        Score(ScoreSettings(clip="ViT-B-32"), device="cpu")
