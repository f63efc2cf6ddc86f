"""The API over a model that reads and writes: every endpoint, in batches and with seeds."""

import base64
import io

import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from serve.api import build_api
from serve.engine import Engine
from serve.limits import Limits
from tests.made import (
    WORDS,
    draw_pictures,
    save_diffusers_autoencoder,
    save_random_bundle,
    save_t5,
)
from tests.serve.conftest import ScriptedEngine
from udiff.recipe import load_recipe

VOCABULARY = len(WORDS) + 4


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual")
    save_t5(folder / "t5")
    save_diffusers_autoencoder(folder / "vae")
    overrides = [
        f"network={{depth: 2, num_heads: 2, head_dim: 8, text_dim: 24, vocab_size: {VOCABULARY}}}",
        f"text={{max_tokens: 12, mask_id: {VOCABULARY - 1}}}",
        "sampling.image={num_steps: 3, guidance_scale: 2}",
        "sampling.text={caption_steps: 6, answer_steps: 4}",
        f"autoencoder={{path: {folder / 'vae'}}}",
        f"text_encoder={{path: {folder / 't5'}, pad: end}}",
    ]
    recipe = load_recipe("dual_diffusion/debug", overrides)
    save_random_bundle(folder / "bundle", recipe, seed=2)
    engine = Engine(str(folder / "bundle"), device="cpu", model_name="tiny")
    with TestClient(build_api(ScriptedEngine(engine), Limits())) as client:
        yield openai.OpenAI(
            base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0
        )
    engine.close()


def picture(seed: int = 0) -> str:
    file = io.BytesIO()
    Image.fromarray(draw_pictures(1, 32, seed=seed)[0]).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(client, *texts, seed=0, n=1):
    content = [{"type": "image_url", "image_url": {"url": picture()}}]
    content += [{"type": "text", "text": text} for text in texts]
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model="tiny", messages=messages, seed=seed, n=n)
    return [choice.message.content for choice in answer.choices]


def draw(client, **keys):
    data = client.images.generate(prompt="a red cat", **keys).data
    return [Image.open(io.BytesIO(base64.b64decode(each.b64_json))) for each in data]


def test_pictures_of_a_text_in_any_size(client):
    assert [each.size for each in draw(client, n=2)] == [(32, 32)] * 2
    assert draw(client, size="48x24")[0].size == (48, 24)


def test_a_size_that_can_not_be_is_a_400(client):
    for size in ("30x32", "wide", "9999x9999"):
        with pytest.raises(openai.BadRequestError):
            draw(client, size=size)


def test_captions_and_answers_have_seeds(client):
    captions = ask(client, seed=3, n=2)
    assert captions == [ask(client, seed=seed)[0] for seed in (3, 4)]
    assert ask(client, "what is red", seed=3) == ask(client, "what is red", seed=3)
    assert ask(client, "what is red", seed=3) != captions[:1]


def test_a_text_alone_is_not_its_task(client):
    with pytest.raises(openai.NotFoundError, match="text_variation"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a cat"}]
        )


def test_the_model_shows_what_its_tasks_take(client):
    (model,) = client.models.list().data
    assert model.tasks["image_to_text"]["output"] == "text"
    assert "question" in model.tasks["visual_question_answering"]["request"]["properties"]
