"""The API over an engine in this process, without Ray."""

import asyncio
import base64
import io
import json
import time

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from serve.api import build_api
from serve.limits import Limits
from serve.records import EngineStoppedError, InvalidOrderError

LIMITS = Limits(max_body_bytes=4096, body_timeout_s=0.3, max_requests=2, deadline_s=0.5)
PATH = "/v1/images/generations"


@pytest.fixture
def api(scripted):
    return build_api(scripted, LIMITS)


@pytest.fixture
def client(api):
    with TestClient(api, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def openai_client(client):
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0
    )


def decode(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def generate(client: openai.OpenAI, **keys):
    return client.images.generate(prompt="cat", **keys).data


def assert_error(response, status: int, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]


def test_openai_client_gets_its_pictures(openai_client):
    pictures = generate(openai_client, model="ddt", n=4, size="32x32", response_format="b64_json")
    images = [decode(picture.b64_json) for picture in pictures]
    assert [image.shape for image in images] == [(32, 32, 3)] * 4
    assert len({image.tobytes() for image in images}) == 4


def test_same_seed_gives_the_same_picture(openai_client):
    first, second = (generate(openai_client, extra_body={"seed": 5}) for _ in range(2))
    assert first[0].b64_json == second[0].b64_json


def test_answer_tells_the_seed_that_gives_each_picture(openai_client):
    pictures = generate(openai_client, n=3)
    again = generate(openai_client, extra_body={"seed": pictures[2].seed})
    difference = decode(again[0].b64_json).astype(int) - decode(pictures[2].b64_json)
    assert abs(difference).max() <= 1  # another batch size moves the last bits
    assert [p.seed - pictures[0].seed for p in pictures] == [0, 1, 2]


def test_seed_is_random_where_none_is_given(openai_client):
    assert generate(openai_client)[0].seed != generate(openai_client)[0].seed


def test_class_is_found_by_name_and_by_number(openai_client):
    def picture(prompt):
        keys = {"seed": 1, "steps": 2, "guidance_scale": 3}
        return openai_client.images.generate(prompt=prompt, extra_body=keys).data[0].b64_json

    assert picture("cat") == picture("3") == picture(" Cat ")
    assert picture("cat") != picture("4")


def test_models_and_health(openai_client, client):
    (model,) = openai_client.models.list().data
    assert (model.id, model.size, model.class_names[3]) == ("ddt", "32x32", "cat")
    assert client.get("/health").json() == {"status": "ok", "model": "ddt"}


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"prompt": "unicorn"}, 400, "prompt"),
        ({"prompt": "10"}, 400, "prompt"),
        ({"prompt": "-1"}, 400, "prompt"),
        ({"prompt": "²"}, 400, "prompt"),
        ({"prompt": "9" * 250}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"n": 0}, 400, "n"),
        ({"n": 11}, 400, "n"),
        ({"n": "4"}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"model": "dall-e-3"}, 404, "model"),
        ({"size": "64x64"}, 400, "size"),
        ({"size": 32}, 400, "size"),
        ({"response_format": "url"}, 400, "response_format"),
        ({"seed": -1}, 400, "seed"),
        ({"seed": 2**53}, 400, "seed"),
        ({"seed": 1.5}, 400, "seed"),
        ({"steps": 0}, 400, "steps"),
        ({"steps": 1001}, 400, "steps"),
        ({"guidance_scale": float("nan")}, 400, "guidance_scale"),
        ({"guidance_scale": float("inf")}, 400, "guidance_scale"),
        ({"stepz": 4}, 400, "stepz"),
        ({"n": 10**3000}, 400, "n"),
    ],
)
def test_bad_value_is_a_4xx_that_names_the_parameter(client, change, status, param):
    body = json.dumps({"prompt": "cat", **change})
    response = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert_error(response, status, param)


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "null", '"cat"', b"\xff", '{"\\ud800": 1, "prompt": "3"}', "[" * 4000]
)
def test_body_that_is_no_json_object_is_a_400(client, body):
    response = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert_error(response, 400)


def test_missing_prompt_and_other_media_types_are_a_400(client):
    assert_error(client.post(PATH, json={"n": 1}), 400, "prompt")
    assert_error(client.post(PATH, data={"prompt": "cat"}), 400)


def test_message_names_what_is_allowed(client):
    def message(**keys):
        return client.post(PATH, json={"prompt": "cat", **keys}).json()["error"]["message"]

    assert "'dog'" in message(prompt="dgo")
    assert "'32x32'" in message(size="1024x1024")
    assert "'ddt'" in message(model="dall-e-2")


def test_unknown_routes_and_methods_have_openais_shape(client):
    assert_error(client.get("/v1/nothing"), 404)
    response = client.get(PATH)
    assert_error(response, 405)
    assert response.headers["allow"] == "POST"


def test_long_body_is_a_413(client):
    assert_error(client.post(PATH, content=b"x" * 5000), 413)
    assert_error(client.post("/v1/nothing", content=b"x" * 5000), 413)


def test_body_at_the_limit_is_read(client):
    body = json.dumps({"prompt": "cat"}).ljust(LIMITS.max_body_bytes)
    response = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200


def test_bug_is_a_500_in_openais_shape(client, scripted):
    scripted.failure = RuntimeError("secret detail")
    response = client.post(PATH, json={"prompt": "cat"})
    assert_error(response, 500)
    assert "secret" not in response.text


def test_order_that_the_engine_refuses_is_a_400(client, scripted):
    scripted.failure = InvalidOrderError("too many steps")
    assert_error(client.post(PATH, json={"prompt": "cat"}), 400)


def test_stopped_engine_is_a_503_that_says_when_to_retry(client, scripted):
    scripted.failure = EngineStoppedError("gone")
    for response in (client.post(PATH, json={"prompt": "cat"}), client.get("/health")):
        assert_error(response, 503)
        assert int(response.headers["retry-after"]) > 0


def test_deadline_is_a_504_and_ends_the_work(client, scripted):
    scripted.hangs = True
    assert_error(client.post(PATH, json={"prompt": "cat"}), 504)
    assert scripted.num_under_way == 0


class Connection:
    """A client at ASGI's level: it sends what it is told to, and may go away."""

    def __init__(self, api, *, body: list[bytes], headers: dict[str, str] | None = None) -> None:
        self.status, self.headers, self.body, self.num_read = 0, {}, b"", 0
        self._api = api
        self._messages: asyncio.Queue[dict] = asyncio.Queue()
        for index, part in enumerate(body):
            more = index + 1 < len(body)
            self._messages.put_nowait({"type": "http.request", "body": part, "more_body": more})
        self._headers = {"content-type": "application/json", **(headers or {})}

    async def run(self) -> None:
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        scope = {
            "type": "http", "method": "POST", "path": PATH, "headers": headers,
            "query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip
        await self._api(scope, self._receive, self._send)

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    async def _receive(self):
        message = await self._messages.get()
        self.num_read += 1
        return message

    async def _send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        self.body += message.get("body", b"")


CAT = b'{"prompt": "cat"}'


def test_announced_length_is_refused_before_the_body_is_read(api):
    connection = Connection(api, body=[b"x"], headers={"content-length": "100000000"})
    asyncio.run(connection.run())
    assert (connection.status, connection.num_read) == (413, 0)


def test_chunked_body_is_refused_at_the_limit(api):
    connection = Connection(api, body=[b"x" * 1000] * 100)
    asyncio.run(connection.run())
    assert (connection.status, connection.num_read) == (413, 5)
    assert json.loads(connection.body)["error"]["code"] == "body_too_large"


def test_dripping_body_is_a_408(api):
    connection = Connection(api, body=[b"{", b""])
    connection._messages.get_nowait()
    connection._messages.get_nowait()
    asyncio.run(connection.run())
    assert connection.status == 408


def test_request_beyond_the_limit_is_a_429_with_retry_after(api, scripted):
    async def three():
        scripted.hangs = True
        connections = [Connection(api, body=[CAT]) for _ in range(3)]
        await asyncio.gather(*(connection.run() for connection in connections))
        return connections

    connections = asyncio.run(three())
    assert sorted(c.status for c in connections) == [429, 504, 504]
    (refused,) = [c for c in connections if c.status == 429]
    assert refused.headers[b"retry-after"] == b"2"
    assert json.loads(refused.body)["error"]["type"] == "rate_limit_error"


def test_client_that_leaves_ends_its_work_and_frees_its_place(api, scripted):
    async def leave():
        scripted.hangs = True
        connection = Connection(api, body=[CAT])
        task = asyncio.create_task(connection.run())
        async with asyncio.timeout(20):
            while not scripted.num_under_way:
                await asyncio.sleep(0.001)
        began = time.monotonic()
        connection.leave()
        await task
        return time.monotonic() - began

    assert asyncio.run(leave()) < 0.2  # the deadline would be 0.5
    assert scripted.num_under_way == 0
