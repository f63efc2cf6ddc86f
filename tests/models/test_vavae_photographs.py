"""VA-VAE at debug size on photographs, and LightningDiT on its latents, from training to HTTP."""

import io
import signal
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

from jobs.fetch_testdata import fetch_stock_photographs
from jobs.fetch_weights import fetch_lpips
from jobs.prepare import prepare_latents
from jobs.sample import main as sample
from jobs.train import train_recipe
from pipelines.latents import LatentsSettings
from tests.made import write_pictures
from tests.photographs import crops_to_train_on, held_out_crops
from tests.serve.conftest import find_free_port
from tests.training.test_trainer import train
from udiff.autoencoders.kl import KLAutoencoder
from udiff.autoencoders.perceptual import load_lpips
from udiff.autoencoders.pixels import to_pixels, to_uint8
from udiff.bundle import load_autoencoder
from udiff.evaluation.reconstruction import psnr
from udiff.recipe import load_recipe
from udiff.training.log import read_metrics

pytestmark = pytest.mark.long

SIZE = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A cache of crops, and the debug VA-VAE trained on it for less than its recipe says."""
    folder = tmp_path_factory.mktemp("vavae")
    write_pictures(folder / "pictures", crops_to_train_on(8, size=SIZE))
    overrides = [
        f"data.cache={folder / 'pictures'}",
        f"objective.perceptual_path={fetch_lpips()}",
        "objective.adversarial.generator_start=100",
        "objective.adversarial.discriminator_start=80",
        "train.images=1_600",
    ]
    train(load_recipe("vavae/debug", overrides), folder / "run")
    return folder


@torch.no_grad()
def judge(autoencoder: KLAutoencoder) -> tuple[float, float]:
    """Measure PSNR and LPIPS of reconstructed held-out crops."""
    images = torch.from_numpy(held_out_crops(4, size=SIZE))
    pixels = to_pixels(images)
    latent = autoencoder.normalize(autoencoder.encode_moments(pixels).mean)
    made = autoencoder.decode(latent)
    distance = load_lpips(fetch_lpips())(pixels, made)
    return psnr(images, to_uint8(made)).mean().item(), distance.mean().item()


def test_all_losses_together_improve_photographs(made) -> None:
    torch.manual_seed(0)
    start = judge(load_recipe("vavae/debug").build_autoencoder())
    end = judge(load_autoencoder(str(made / "run" / "bundle")))
    assert end[0] > start[0] + 5
    assert end[1] < 0.8 * start[1]
    rows = read_metrics(made / "run")
    assert rows[-1]["autoencoder/alignment"] < rows[0]["autoencoder/alignment"]
    assert rows[-1]["autoencoder/adversarial_factor"] == 1


def test_tiles_of_a_trained_autoencoder_are_hard_to_see(made) -> None:
    autoencoder = load_autoencoder(str(made / "run" / "bundle"))
    files = sorted(fetch_stock_photographs().glob("*.jpg"))[:4]
    images = torch.stack([_open(file, side=128) for file in files])
    whole = _reconstruct(autoencoder, images)
    autoencoder.save_memory(tile=64)
    tiled = _reconstruct(autoencoder, images)
    assert psnr(tiled, whole).mean() > 25
    assert psnr(tiled, images).mean() > psnr(whole, images).mean() - 0.5


def _open(file: Path, side: int) -> torch.Tensor:
    with Image.open(file) as photograph:
        return torch.from_numpy(np.array(photograph.convert("RGB").resize((side, side))))


def _reconstruct(autoencoder: KLAutoencoder, images: torch.Tensor) -> torch.Tensor:
    moments = autoencoder.encode_moments(to_pixels(images))
    return to_uint8(autoencoder.decode(autoencoder.normalize(moments.mean)))


def test_lightningdit_learns_on_its_latents_and_is_served(made, tmp_path) -> None:
    autoencoder = made / "run" / "bundle"
    settings = LatentsSettings(
        input=str(made / "pictures"),
        output=str(tmp_path / "latents"),
        autoencoder=str(autoencoder),
        workers=1,
    )
    assert prepare_latents(settings).manifest.num_rows == 640
    overrides = [
        f"data.cache={tmp_path / 'latents'}",
        f"autoencoder.path={autoencoder}",
        "network={dim: 64, num_heads: 2, depth: 3}",
        "train={images: 1_600, batch_size: 32}",
        "optimizer.warmup_steps=10",
    ]
    recipe = load_recipe("lightningdit/debug_vavae", overrides)
    report = train_recipe(recipe, run_folder=tmp_path / "run", workers=2)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]
    out = tmp_path / "samples.png"
    arguments = ["--labels", "0", "--per-label", "2", "--out", str(out)]
    assert sample(["--bundle", report.bundle, *arguments]) == 0
    assert out.exists()
    assert _ask_server(report.bundle).size == (SIZE, SIZE)


def _ask_server(bundle: str) -> Image.Image:
    port = find_free_port()
    command = [sys.executable, "-m", "jobs.serve", "--bundle", bundle, "--port", str(port)]
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        body = {"prompt": "0", "response_format": "b64_json"}
        url = f"http://127.0.0.1:{port}/v1/images/generations"
        answer = httpx2.post(url, json=body, timeout=60).json()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    return Image.open(io.BytesIO(b64decode(answer["data"][0]["b64_json"])))
