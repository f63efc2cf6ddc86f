"""Dual Diffusion from web shards to a trained bundle, at toy size and with tiny random encoders."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jobs.fashion_mnist import Members, write_shards
from pipelines.latents import LatentsChain, plan_latents
from pipelines.latents_settings import LatentsSettings
from pipelines.picture_files import open_pictures
from pipelines.pictures import PicturesChain, PicturesSettings, pictures_fields, plan_pictures
from pipelines.source import open_source
from pipelines.stages.write import WriteUnit
from tests.made import WORDS, draw_pictures, save_diffusers_autoencoder, save_t5
from udiff.data.manifest import finish, read_manifest
from udiff.data.storage import open_folder
from udiff.fit import fit, make_stream
from udiff.generate import Generator
from udiff.recipe import load_recipe
from udiff.resolve import resolve
from udiff.training.run import local_run

BUCKETS = ("32x32", "24x40", "40x24")
SIZES = [(60, 60), (30, 70), (80, 44), (33, 31), (50, 81), (64, 40)] * 8
IMAGE_LOSS, TEXT_LOSS = "image_data_mse", "text_masked_nll"
COLORS = ("red", "green", "blue")
VOCABULARY = len(WORDS) + 4
NETWORK = (
    f"network={{depth: 2, num_heads: 2, head_dim: 16, text_dim: 24, vocab_size: {VOCABULARY}, "
    "base_size: 16, max_size: 24}"
)


def _sample(number: int, height: int, width: int) -> Members:
    color = number % 3
    picture = draw_pictures(1, max(height, width), seed=number)[0][:height, :width] // 4
    picture[..., color] += 160
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    caption = f"a {COLORS[color]} cat"
    said = [("human", "what color is the cat"), ("gpt", COLORS[color])]
    talk = [{"from": who, "value": text} for who, text in said]
    described = {"caption": caption, "conversations": talk}
    return {
        "png": file.getvalue(),
        "txt": caption.encode(),
        "json": json.dumps(described).encode(),
    }


def _make_caches(folder: Path, *, name: str, **sizes) -> None:
    """Carry the shards through the chains themselves, without Ray."""
    settings = PicturesSettings(
        input=str(folder / "shards"), output=str(folder / f"{name}_pictures"), conversations=True,
        unit_rows=20, row_group_size=8, **sizes,
    )  # fmt: skip
    output, source = open_folder(settings.output), open_source(settings.input)
    plan = plan_pictures(settings)
    write = WriteUnit(
        output,
        schema=pictures_fields(settings),
        buckets=plan.buckets,
        plan=plan.fingerprint,
        row_group_size=8,
    )
    chain = PicturesChain(settings, source, write, made_by=None)
    units = [unit for file in plan.inputs.items() for unit in source.cut(output, *file, 20)]
    for unit in units:
        chain(unit)
    finish(output, plan, [unit.name for unit in units])
    _make_latents(folder, name)


def _make_latents(folder: Path, name: str) -> None:
    text = {"encoder": "t5", "path": str(folder / "t5"), "pad": "end", "store": "tokens"}
    settings = LatentsSettings(
        input=str(folder / f"{name}_pictures"),
        output=str(folder / name),
        autoencoder=str(folder / "vae"),
        texts=[
            {**text, "name": "caption", "max_tokens": 6},
            {
                **text, "name": "conversation", "source": "conversation", "max_tokens": 12,
                "layout": "forward",
            },
        ],
        row_group_size=8,
    )  # fmt: skip
    plan = plan_latents(settings)
    chain, units = LatentsChain(settings, plan), open_pictures(settings.input).units()
    for unit in units:
        chain(unit)
    finish(open_folder(settings.output), plan, [unit.name for unit in units])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual")
    samples = [_sample(number, *size) for number, size in enumerate(SIZES)]
    write_shards(folder / "shards", samples, 24)
    save_t5(folder / "t5")
    save_diffusers_autoencoder(folder / "vae")
    _make_caches(folder, name="mixed", buckets=BUCKETS)
    _make_caches(folder, name="square", size=32)
    return folder


def _overrides(made, cache: str, *more: str) -> list[str]:
    return [
        NETWORK,
        f"text={{max_tokens: 12, mask_id: {VOCABULARY - 1}}}",
        f"autoencoder.path={made / 'vae'}",
        f"text_encoder.path={made / 't5'}",
        f"data={{cache: {made / cache}, lanes: 2}}",
        "train.batch_size=8",
        "train.log_every=1",
        *more,
    ]


def _losses(run: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_several_aspect_ratios_train_with_every_sample_once_an_epoch(made, tmp_path):
    recipe = load_recipe(
        "dual_diffusion/debug_buckets", _overrides(made, "mixed", "train.images=96")
    )
    resolved = resolve(recipe)
    stream = make_stream(resolved, recipe.build().columns)
    batches = stream.batches(0, batch_size=8, seed=0)
    epoch = [next(batches) for _ in range(len(SIZES) // 8)]
    batches.close()
    for part in ("image", "text"):
        shapes = {batch[f"{part}.latent_mean"].shape[2:] for batch in epoch}
        assert shapes == {(8, 8), (6, 10), (10, 6)}
        rows = [row.numpy().tobytes() for batch in epoch for row in batch[f"{part}.latent_mean"]]
        assert len(set(rows)) == len(SIZES) == read_manifest(made / "mixed").num_rows
    with local_run() as run:
        report = fit(resolved, folder=tmp_path / "run", run=run)
    request = {"prompt": "a red cat", "width": 40, "height": 24, "num_steps": 2}
    picture = Generator(report.bundle).generate([request], task="text_to_image")[0]
    assert np.asarray(picture).shape == (24, 40, 3)


@pytest.mark.long
def test_it_learns_pictures_and_captions_and_then_to_answer(made, tmp_path):
    longer = ("train.images=480", "optimizer.lr=5e-3")
    with local_run() as run:
        base = fit(
            resolve(load_recipe("dual_diffusion/debug", _overrides(made, "square", *longer))),
            folder=tmp_path / "base",
            run=run,
        )
        start = f"initialize_from={base.bundle}"
        tuned = _overrides(made, "square", *longer, start, f"text_data.cache={made / 'mixed'}")
        recipe = load_recipe(
            "dual_diffusion/debug_sft",
            [*tuned, "latent={height: null, width: null, channels: 4, side: 8, downscale: 4}"],
        )
        fit(resolve(recipe), folder=tmp_path / "sft", run=run)
    for name, loss in (("base", IMAGE_LOSS), ("base", TEXT_LOSS), ("sft", TEXT_LOSS)):
        values = _losses(tmp_path / name, loss)
        assert np.mean(values[-15:]) < 0.9 * np.mean(values[:5]), (name, loss)
    learned, kept = (np.mean(_losses(tmp_path / n, IMAGE_LOSS)[-20:]) for n in ("base", "sft"))
    assert kept < 1.2 * learned  # what was learned of pictures is not lost over the answers
    rows = [
        load_file(tmp_path / name / "bundle/weights.safetensors")["mask_row.weight"]
        for name in ("base", "sft")
    ]
    assert torch.equal(*rows)  # the row of the mask goes along


RUN = """
import sys
from pathlib import Path
from udiff.fit import fit
from udiff.recipe import load_recipe
from udiff.resolve import resolve
from udiff.training.run import local_run
recipe = resolve(load_recipe("dual_diffusion/debug", sys.argv[2:]))
with local_run() as run:
    fit(recipe, folder=Path(sys.argv[1]), run=run)
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(made, tmp_path):
    overrides = _overrides(made, "square", "train.images=240", "train.checkpoint_every=10")

    def start(folder: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", RUN, str(folder), *overrides])

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed)
    while not (killed / "checkpoints" / "step_00000010" / ".metadata").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (killed / "bundle").exists()
    for folder in (killed, whole):
        assert start(folder).wait() == 0
    weights = [(f / "bundle" / "weights.safetensors").read_bytes() for f in (killed, whole)]
    assert weights[0] == weights[1]
