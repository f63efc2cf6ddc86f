"""The application on a real Ray Serve, asked by the real `openai` client."""

import base64
import io
import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
import ray
from PIL import Image
from ray import serve

from serve.app import APP_NAME, build, parse_args
from serve.proxy import install

pytestmark = pytest.mark.ray

MB = 1_000_000


@pytest.fixture(scope="module")
def url(bundle_path, free_port, metrics_port):
    ray.shutdown()  # of a Ray that tests before these have shared
    install()
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _metrics_export_port=metrics_port,
    )
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    serve.start(http_options={"host": "127.0.0.1", "port": free_port}, logging_config=quiet)
    serve.run(build({"bundle": str(bundle_path)}), name=APP_NAME, logging_config=quiet)
    yield f"http://127.0.0.1:{free_port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def generate(client: openai.OpenAI, *, n: int = 1, **keys) -> list[bytes]:
    pictures = client.images.generate(prompt="dog", n=n, extra_body=keys).data
    return [base64.b64decode(picture.b64_json) for picture in pictures]


def test_four_pictures_of_the_size_asked(client):
    answer = client.images.generate(model="ddt", prompt="dog", n=4, size="32x32")
    files = [base64.b64decode(picture.b64_json) for picture in answer.data]
    assert len(set(files)) == 4
    assert all(Image.open(io.BytesIO(file)).size == (32, 32) for file in files)
    assert all(Image.open(io.BytesIO(file)).format == "PNG" for file in files)


def test_same_seed_gives_the_same_picture(client):
    assert generate(client, seed=11) == generate(client, seed=11)
    assert generate(client, seed=11) != generate(client, seed=12)


def test_requests_side_by_side_get_their_own_pictures(client):
    alone = [generate(client, seed=seed)[0] for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda seed: generate(client, seed=seed)[0], range(6)))
    for mine, theirs in zip(together, alone, strict=True):
        images = [np.asarray(Image.open(io.BytesIO(file))).astype(int) for file in (mine, theirs)]
        assert abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"prompt": "unicorn"}, openai.BadRequestError),
        ({"n": 0}, openai.BadRequestError),
        ({"size": "256x256"}, openai.BadRequestError),
        ({"response_format": "url"}, openai.BadRequestError),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError),
        ({"model": "gpt-image-1"}, openai.NotFoundError),
    ],
)
def test_bad_request_is_its_4xx(client, keys, error):
    with pytest.raises(error) as caught:
        client.images.generate(**{"prompt": "dog", **keys})
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.type == "invalid_request_error"


def test_invalid_json_unknown_routes_and_methods_have_openais_shape(url):
    headers = {"content-type": "application/json"}
    answers = [
        httpx2.post(f"{url}/v1/images/generations", content="{", headers=headers),
        httpx2.get(f"{url}/v2"),
        httpx2.delete(f"{url}/v1/models"),
    ]
    assert [answer.status_code for answer in answers] == [400, 404, 405]
    assert all(set(answer.json()) == {"error"} for answer in answers)


def test_models_and_health(client, url):
    (model,) = client.models.list().data
    assert (model.id, model.size) == ("ddt", "32x32")
    assert httpx2.get(f"{url}/health").json()["status"] == "ok"


def find_process(name: str) -> Path:
    """Find a process of this test's Ray by its title (`ray::ServeReplica:udiff:engine`)."""
    (process,) = [p for p in Path("/proc").glob("[0-9]*") if name in title(p) and is_ours(p)]
    return process


def title(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:  # ended meanwhile
        return ""


def is_ours(process: Path) -> bool:
    while process.name not in ("0", str(os.getpid())):
        parent = re.search(r"PPid:\s+(\d+)", (process / "status").read_text())[1]
        process = Path("/proc") / parent
    return process.name != "0"


def serve_memory() -> int:
    """Add up the resident bytes of proxy and front."""
    statuses = [
        (find_process(name) / "status").read_text() for name in ("ray::ProxyActor", ":front")
    ]
    return sum(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024 for status in statuses)


def refuse(url, content):
    answer = httpx2.post(
        f"{url}/v1/images/generations",
        content=content,
        headers={"content-type": "application/json"},
        timeout=30,
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("says_its_size", [True, False])
def test_100_mb_body_is_refused_at_little_cost(client, url, says_its_size):
    def body():
        return b"x" * 100 * MB if says_its_size else (b"x" * MB for _ in range(100))

    generate(client)
    refuse(url, body())  # what the first of a kind costs once is not the body's size
    before = serve_memory()
    for _ in range(3):
        refuse(url, body())
    assert serve_memory() - before < 20 * MB  # of 300 sent
    assert generate(client)


def test_front_holds_no_torch(client):
    generate(client)
    assert "libtorch" in (find_process(":engine") / "maps").read_text()
    assert "libtorch" not in (find_process(":front") / "maps").read_text()


def test_killed_engine_costs_no_request(client):
    undisturbed = generate(client, seed=3, steps=400)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(generate, client, seed=3, steps=400)
        time.sleep(0.3)
        assert not answer.done()
        os.kill(int(find_process(":engine").name), signal.SIGKILL)
        assert answer.result(timeout=60) == undisturbed


def test_metrics_are_on_rays_port(client, metrics_port):
    generate(client, n=2)
    wanted = (
        r'ray_udiff_requests_total\{.*status="200".*\} [1-9]',
        r"ray_udiff_outputs_total\{.*\} [1-9]",
        r"ray_udiff_tick_rows_count\{.*\} [1-9]",
    )
    deadline = time.monotonic() + 40
    text = ""
    while time.monotonic() < deadline and not all(re.search(line, text) for line in wanted):
        time.sleep(1)
        text = httpx2.get(f"http://127.0.0.1:{metrics_port}/metrics").text
    assert [line for line in wanted if not re.search(line, text)] == []


def test_misspelt_argument_is_one_readable_line():
    with pytest.raises(ValueError, match=r"^max_row is not an argument.*did you mean max_rows\?$"):
        build({"bundle": "runs/demo/bundle", "max_row": 3})
    with pytest.raises(ValueError, match=r"^num_engines: .* got 'two'$"):
        parse_args({"bundle": "b", "num_engines": "two"})
    assert parse_args({"bundle": "b", "num_engines": "2"}).num_engines == 2


def test_error_bodies_are_ascii_json(url):
    answer = httpx2.post(f"{url}/v1/images/generations", json={"prompt": "猫"})
    assert json.loads(answer.content.decode("ascii"))["error"]["param"] == "prompt"
