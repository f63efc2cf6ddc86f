"""Judging autoencoders: bundles, diffusers folders and official files by one command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.evaluate_autoencoder import main
from jobs.fetch_weights import fetch_lpips
from tests.made import draw_pictures, save_autoencoder, write_pictures
from udiff.autoencoders.ldm import LDMArchitecture, LDMAutoencoder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_pictures(folder / "pictures", draw_pictures(50, 32), rows_per_file=20)
    save_autoencoder(folder / "bundle")
    torch.manual_seed(0)
    network = LDMAutoencoder(LDMArchitecture(32, (1, 1), 1, 4, 4))
    torch.save({"state_dict": network.state_dict()}, folder / "official.ckpt")
    return folder


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
    assert "holds 50 pictures, 51 are wanted" in capsys.readouterr().err
