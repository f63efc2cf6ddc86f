"""Judging autoencoders: bundles, diffusers folders and official files by one command."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.evaluate_autoencoder import main
from jobs.fashion_mnist import make_sample, write_shards
from jobs.fetch_weights import fetch_lpips
from tests.made import draw_pictures, save_autoencoder, write_pictures
from udiff.autoencoders.ldm import LDMArchitecture, LDMAutoencoder
from udiff.autoencoders.pixels import to_uint8
from udiff.evaluation.reconstruction import evaluation_crop

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_pictures(folder / "pictures", draw_pictures(50, 32), rows_per_file=20)
    samples = [make_sample(_png(picture), "made", 0) for picture in draw_pictures(12, 48)]
    broken = {**samples[0], "png": samples[0]["png"][:100]}
    write_shards(folder / "shards", [*samples, broken], 5)
    save_autoencoder(folder / "bundle")
    torch.manual_seed(0)
    network = LDMAutoencoder(LDMArchitecture(32, (1, 1), 1, 4, 4))
    torch.save({"state_dict": network.state_dict()}, folder / "official.ckpt")
    return folder


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", ["bundle", "official.ckpt"])
def test_an_autoencoder_is_judged(made, tmp_path, name):
    arguments = ["--autoencoder", str(made / name), "--pictures", str(made / "pictures")]
    arguments += ["--lpips", str(fetch_lpips()), "--num-pictures", "45", "--num-examples", "5"]
    for out, workers in ((tmp_path / "one", "1"), (tmp_path / "two", "2")):
        assert main([*arguments, "--workers", workers, "--out", str(out)]) == 0
    one, two = (json.loads((tmp_path / k / "evaluation.json").read_text()) for k in ("one", "two"))
    assert one["num_pictures"] == 45
    assert len(one["latent_std"]) == 4
    assert one["encode_images_per_s"] > 0
    assert one["peak_gib"] > 0
    # Batches are cut elsewhere, which moves the last bits.
    for measure in ("psnr", "ssim", "lpips", "latent_mean", "latent_std"):
        assert two[measure] == pytest.approx(one[measure], rel=1e-3), measure
    grid = np.asarray(Image.open(tmp_path / "one" / "reconstructions.png"))
    assert grid.shape[0] == 2 * (64 + 2)


def test_too_few_pictures_are_an_error(made, capsys):
    arguments = ["--autoencoder", str(made / "bundle"), "--pictures", str(made / "pictures")]
    assert main([*arguments, "--num-pictures", "51"]) == 2
    assert "there are 50 pictures, 51 are wanted" in capsys.readouterr().err


def test_pictures_of_no_cache_need_a_size(made, capsys):
    arguments = ["--autoencoder", str(made / "bundle"), "--pictures", str(made / "shards")]
    assert main(arguments) == 2
    assert "--size says what to crop pictures to" in capsys.readouterr().err


def test_shards_are_judged_as_their_cropped_pictures(made, tmp_path):
    arguments = ["--autoencoder", str(made / "bundle"), "--lpips", str(fetch_lpips())]
    shards = ["--pictures", str(made / "shards"), "--size", "32", "--sliced"]
    assert main([*arguments, *shards, "--out", str(tmp_path / "shards")]) == 0
    crops = np.stack([_crop(picture) for picture in draw_pictures(12, 48)])
    write_pictures(tmp_path / "cache", crops)
    cache = ["--pictures", str(tmp_path / "cache")]
    assert main([*arguments, *cache, "--out", str(tmp_path / "whole")]) == 0
    found, whole = (
        json.loads((tmp_path / name / "evaluation.json").read_text())
        for name in ("shards", "whole")
    )
    assert (found["num_pictures"], found["num_rejected"]) == (12, 1)
    assert (whole["num_pictures"], whole["num_rejected"]) == (12, 0)
    # The noise goes by a picture's number, and crops are not rounded to 8 bits.
    for measure in ("psnr", "ssim", "lpips"):
        assert found[measure] == pytest.approx(whole[measure], rel=0.01), measure


def _crop(picture: np.ndarray) -> np.ndarray:
    pixels = evaluation_crop(torch.from_numpy(picture), 32)
    return to_uint8(pixels[None])[0].numpy()
