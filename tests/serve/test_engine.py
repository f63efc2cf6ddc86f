"""The engine alone: no HTTP, no Ray."""

import asyncio
import time

import numpy as np
import pytest
import torch

from serve.engine import Engine
from serve.records import EngineStoppedError, InvalidOrderError, Order
from serve.tick_loop import Job, Pending, TickLoop
from tests.made import save_autoencoder, save_random_bundle
from udiff.autoencoders.pixels import to_uint8
from udiff.bundle import load_bundle, load_latent_decoder
from udiff.generate import Sample
from udiff.recipe import load_recipe
from udiff.samplers.ticks import drive, start


def order(*seeds: int, **keys) -> Order:
    return Order("class_to_image", tuple({"seed": seed, **keys} for seed in seeds))


ORDER = order(7, 8, label=3, guidance_scale=2.0)
LONG = order(0, label=1, num_steps=1000)


@pytest.mark.parametrize("family", ["ddt", "lightningdit", "mdtv2"])
def test_every_class_conditional_family_is_served(tmp_path, family):
    save_autoencoder(tmp_path / "vae")
    recipe = load_recipe(f"{family}/debug", [f"autoencoder.path={tmp_path / 'vae'}"])
    save_random_bundle(tmp_path / "bundle", recipe, seed=2)
    engine = Engine(str(tmp_path / "bundle"), device="cpu")
    try:
        pictures = asyncio.run(engine.generate(order(7, 8, label=3, num_steps=3)))
        assert np.shape(pictures) == (2, 32, 32, 3)
        assert engine.facts.name == family
    finally:
        engine.close()


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def test_latents_equal_those_of_sampling_alone(bundle_path):
    bundle = load_bundle(bundle_path)
    task = bundle.system.tasks["class_to_image"]

    def begin(seed):
        request = task.request(label=seed % 10, seed=seed, num_steps=4 + seed, guidance_scale=2.0)
        return task.start(request, device=torch.device("cpu"))

    finished = []
    alone = [drive(task.network, [begin(seed)])[0] for seed in range(5)]

    def finish(samples):
        finished.extend(sample.running.result for sample in samples)
        return [np.zeros((4, 4, 3), np.uint8) for _ in samples]

    loop = TickLoop(finish, max_rows=6)
    for seed in range(5):
        sample = Sample(task, start(task.network, begin(seed)))
        loop.submit(Job([Pending(sample)], lambda outcome: None))
    asyncio.run(until(lambda: len(finished) == 5))
    loop.close()

    for mine, theirs in zip(finished, alone, strict=True):  # fewer steps end first
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_pictures_are_the_decoded_samples_of_consecutive_seeds(engine, bundle_path):
    bundle = load_bundle(bundle_path)
    task = bundle.system.tasks["class_to_image"]
    requests = [task.request(label=3, seed=seed, guidance_scale=2.0) for seed in (7, 8)]
    samples = drive(task.network, [task.start(r, device=torch.device("cpu")) for r in requests])
    with torch.inference_mode():
        decoded = to_uint8(load_latent_decoder(bundle.recipe).decode(torch.stack(samples)))

    images = asyncio.run(engine.generate(ORDER))

    assert np.shape(images) == (2, 32, 32, 3)
    assert abs(np.array(images, int) - decoded.numpy().astype(int)).max() <= 1
    assert np.std(images) > 5  # no flat gray


def test_same_seed_gives_the_same_bytes(engine):
    first = asyncio.run(engine.generate(ORDER))
    assert np.array_equal(asyncio.run(engine.generate(ORDER)), first)


def test_requests_of_different_lengths_share_ticks(engine, ticks):
    async def both():
        orders = [order(1, label=1, num_steps=steps, guidance_scale=1.0) for steps in (20, 30)]
        await asyncio.gather(*map(engine.generate, orders))

    asyncio.run(both())
    assert sum(ticks) == 50
    assert len(ticks) <= 32  # 30 when the second comes within the first tick


def test_a_tick_has_no_more_rows_than_allowed(bundle_path):
    rows = []
    engine = Engine(str(bundle_path), device="cpu", max_rows=5, on_tick=rows.append)
    asyncio.run(engine.generate(order(*range(7), label=0, guidance_scale=3.0)))
    engine.close()
    assert max(rows) <= 5
    # Guidance is off at t = 0: 8 steps of 7 pictures, of which 7 steps take two rows.
    assert sum(rows) == 7 * (1 + 7 * 2)


def test_one_picture_is_driven_whatever_the_limit(bundle_path):
    engine = Engine(str(bundle_path), device="cpu", max_rows=1)
    images = asyncio.run(engine.generate(ORDER))
    engine.close()
    assert len(images) == 2


def test_cancelled_order_costs_no_more_ticks(engine, ticks):
    async def cancel_under_way():
        task = asyncio.create_task(engine.generate(LONG))
        await until(lambda: ticks)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return len(ticks)

    num_ticks = asyncio.run(cancel_under_way())
    time.sleep(0.2)
    assert len(ticks) <= num_ticks + 1  # the one under way
    assert len(asyncio.run(engine.generate(ORDER))) == 2


def test_order_that_the_model_can_not_fill_is_refused(engine):
    with pytest.raises(InvalidOrderError, match=r"0\.\.9, got 10"):
        asyncio.run(engine.generate(order(0, label=10)))


def test_close_ends_orders_under_way_and_later_ones(engine, ticks):
    async def close_under_way():
        task = asyncio.create_task(engine.generate(LONG))
        await until(lambda: ticks)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineStoppedError):
            await task
        with pytest.raises(EngineStoppedError):
            await engine.generate(ORDER)

    asyncio.run(close_under_way())
    with pytest.raises(EngineStoppedError, match="dead"):
        engine.check()


def test_failed_tick_ends_orders_and_fails_the_health_check(bundle_path):
    def fail(num_rows):
        raise MemoryError(f"{num_rows} rows")

    engine = Engine(str(bundle_path), device="cpu", on_tick=fail)
    engine.check()
    with pytest.raises(EngineStoppedError):
        asyncio.run(engine.generate(ORDER))
    engine.close()
    with pytest.raises(EngineStoppedError):
        engine.check()


def test_stuck_tick_fails_the_health_check(bundle_path):
    task = load_bundle(bundle_path).system.tasks["class_to_image"]
    sampling = task.start(task.request(label=0, num_steps=1), device=torch.device("cpu"))
    loop = TickLoop(
        lambda samples: [np.zeros((4, 4, 3), np.uint8)],
        max_rows=1,
        stall_s=0.05,
        on_tick=lambda num_rows: time.sleep(0.5),
    )
    sample = Sample(task, start(task.network, sampling))
    loop.submit(Job([Pending(sample)], lambda outcome: None))
    time.sleep(0.2)
    with pytest.raises(EngineStoppedError, match=r"over 0\.05 s"):
        loop.check()
    loop.close()


def test_bundle_without_a_task_is_refused(bundle_path):
    with pytest.raises(ValueError, match="of family kl_autoencoder, without a task"):
        Engine(str(bundle_path / "autoencoder"), device="cpu")
