"""A small bundle with random weights, and what serves it."""

import asyncio
import socket
from pathlib import Path

import pytest

from serve.engine import Engine
from serve.records import EngineStoppedError, ModelFacts, Order
from tests.made import save_random_bundle
from udiff.recipe import load_recipe

CLASS_NAMES = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    save_random_bundle(folder / "autoencoder", load_recipe("kl_autoencoder/debug"), seed=1)
    overrides = [
        "network={dim: 64, num_heads: 2, num_blocks: 3, num_encoder_blocks: 2}",
        f"autoencoder.path={folder / 'autoencoder'}",
        f"data.class_names=[{', '.join(CLASS_NAMES)}]",
        "sampling.num_steps=8",
    ]
    save_random_bundle(folder / "bundle", load_recipe("ddt/debug", overrides), seed=2)
    return folder / "bundle"


@pytest.fixture
def ticks() -> list[int]:
    """Rows of each tick of `engine`."""
    return []


@pytest.fixture
def engine(bundle_path, ticks):
    engine = Engine(str(bundle_path), device="cpu", on_tick=ticks.append)
    yield engine
    engine.close()


class ScriptedEngine:
    """An engine client that answers at once, never, or with an error."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: Exception | None = None
        self.hangs = False
        self.num_under_way = 0

    async def describe(self) -> ModelFacts:
        if isinstance(self.failure, EngineStoppedError):
            raise self.failure
        return self.engine.facts

    async def generate(self, order: Order):
        if self.failure:
            raise self.failure
        self.num_under_way += 1
        try:
            if self.hangs:
                await asyncio.Event().wait()
            return await self.engine.generate(order)
        finally:
            self.num_under_way -= 1


@pytest.fixture
def scripted(engine) -> ScriptedEngine:
    return ScriptedEngine(engine)


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def free_port() -> int:
    return find_free_port()


@pytest.fixture(scope="session")
def metrics_port() -> int:
    return find_free_port()
