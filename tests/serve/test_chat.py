"""Chats: which task a message asks for, and with what."""

import base64
import io
from typing import ClassVar

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import BaseModel

from serve.api import build_api
from serve.limits import Limits
from serve.records import ModelFacts, Order, TaskFacts
from udiff.requests import Picture, open_picture


class Caption(BaseModel):
    image: Picture
    seed: int = 0
    num_steps: int | None = None


class Question(Caption):
    question: str


class Variation(BaseModel):
    prompt: str
    seed: int = 0
    temperature: float = 1.0


class Scribe:
    """An engine client that writes what it was asked, after checking it as an engine does."""

    records: ClassVar = {
        "image_to_text": Caption,
        "visual_question_answering": Question,
        "text_variation": Variation,
    }

    async def describe(self) -> ModelFacts:
        tasks = {
            name: TaskFacts("text", record.model_json_schema())
            for name, record in self.records.items()
        }
        return ModelFacts("scribe", tasks)

    async def generate(self, order: Order) -> list[str]:
        return [self._write(order.task, request) for request in order.requests]

    def _write(self, task: str, request) -> str:
        checked = self.records[task].model_validate(dict(request))
        image = getattr(checked, "image", None)
        seen = f" {open_picture(image).size}" if image else ""
        return f"{task} {checked.seed}{seen} {getattr(checked, 'question', '')}".strip()


@pytest.fixture
def client():
    with TestClient(build_api(Scribe(), Limits())) as client:
        yield client


def picture(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(client, content, **keys):
    messages = [{"role": "user", "content": content}]
    return client.post("/v1/chat/completions", json={"messages": messages, **keys})


IMAGE = {"type": "image_url", "image_url": {"url": picture(3, 2)}}


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ([IMAGE], "image_to_text 5 (3, 2)"),
        ([IMAGE, {"type": "text", "text": "what?"}], "visual_question_answering 5 (3, 2) what?"),
        ("a cat", "text_variation 5"),
        ([{"type": "text", "text": "a cat"}], "text_variation 5"),
    ],
)
def test_what_a_message_holds_says_which_task_it_is(client, content, answer):
    body = ask(client, content, seed=5).json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "scribe"
    assert [choice["message"]["content"] for choice in body["choices"]] == [answer]


def test_choices_have_consecutive_seeds(client):
    choices = ask(client, [IMAGE], seed=7, n=3).json()["choices"]
    assert [choice["seed"] for choice in choices] == [7, 8, 9]
    assert [choice["message"]["content"].split()[1] for choice in choices] == ["7", "8", "9"]


@pytest.mark.parametrize(
    ("content", "keys", "status", "said"),
    [
        ([IMAGE, IMAGE], {}, 400, "one picture"),
        ([{"type": "image_url", "image_url": {"url": "http://a/b.png"}}], {}, 400, "url"),
        ([IMAGE], {"temperature": 0.5}, 400, "temperature is not a parameter of the task"),
        ("", {}, 400, "content"),
        ("cat", {"n": 0}, 400, "n"),
        ("cat", {"model": "gpt-5"}, 404, "'scribe'"),
        ("cat", {"stream": True}, 400, "stream"),
    ],
)
def test_a_chat_that_can_not_be_is_a_4xx_that_says_why(client, content, keys, status, said):
    response = ask(client, content, **keys)
    assert response.status_code == status
    assert said in response.json()["error"]["message"]


def test_a_model_of_text_makes_no_pictures(client):
    response = client.post("/v1/images/generations", json={"prompt": "cat"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "task_not_found"


def test_any_task_is_asked_by_its_name(client):
    requests = [{"prompt": "a", "seed": seed} for seed in (1, 2)]
    response = client.post("/v1/tasks/text_variation", json={"requests": requests})
    assert response.json()["data"] == [
        {"b64_json": None, "text": f"text_variation {seed}"} for seed in (1, 2)
    ]
    assert client.post("/v1/tasks/paint", json={"requests": requests}).status_code == 404
    assert client.post("/v1/tasks/text_variation", json={"requests": []}).status_code == 400
