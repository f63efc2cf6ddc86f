"""`jobs.sample` and `jobs.evaluate` on a bundle with random weights."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from jobs.evaluate import main as evaluate
from jobs.fashion_mnist import CLASS_NAMES, make_sample, write_shards
from jobs.picture_grid import draw_grid
from jobs.prepare import prepare_pictures
from jobs.sample import main as sample
from pipelines.generate import generate
from pipelines.pictures import PicturesSettings
from tests.made import save_autoencoder, save_random_bundle
from udiff.generate import Generator
from udiff.recipe import load_recipe

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    save_autoencoder(folder / "vae")
    overrides = [
        "network={dim: 32, num_heads: 2, num_blocks: 3, num_encoder_blocks: 2}",
        f"data.class_names=[{', '.join(CLASS_NAMES)}]",
        "sampling.num_steps=2",
        f"autoencoder.path={folder / 'vae'}",
    ]
    save_random_bundle(folder / "bundle", load_recipe("ddt/debug", overrides), seed=2)
    return folder / "bundle"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two caches of different pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for name in ("one", "other"):
        samples = []
        for number in range(60):
            levels = draw.integers(0, 256, (4, 4, 3), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(levels).resize((32, 32)).save(buffer, "PNG")
            samples.append(make_sample(buffer.getvalue(), f"blur {number}", number % 10))
        write_shards(folder / "shards" / name, samples, 1000)
        prepare_pictures(
            PicturesSettings(
                input=str(folder / "shards" / name), output=str(folder / name), size=32, workers=1
            )
        )
    return folder


def test_a_grid_has_a_row_per_label_of_the_pictures_of_their_seeds(bundle, tmp_path):
    out = tmp_path / "deep" / "samples.png"
    arguments = [
        "--bundle",
        str(bundle),
        "--out",
        str(out),
        "--labels",
        "bag,3",
        "--per-label",
        "2",
    ]
    assert sample([*arguments, "--seed", "9"]) == 0
    requests = [{"label": label, "seed": seed} for label in (8, 3) for seed in (9, 10)]
    pictures = np.stack(Generator(bundle).generate(requests))
    expected = draw_grid(pictures, ["bag", "dress"], columns=2, zoom=2)
    with Image.open(out) as grid:
        assert np.array_equal(np.asarray(grid), np.asarray(expected))


@pytest.mark.long
def test_the_cluster_draws_what_one_process_draws(bundle):
    requests = [{"label": k % 10, "seed": k} for k in range(10)]
    spread = generate(str(bundle), requests, workers=2, batch_size=4).pictures
    alone = np.concatenate([Generator(bundle).generate(requests[k : k + 4]) for k in (0, 4, 8)])
    assert np.array_equal(spread, alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "spaceship"], "there is no 'spaceship'; there are t-shirt, trouser"),
        (["--labels", "10"], "there is no '10'"),
        (["--per-label", "0"], "--per-label must be at least 1, got 0"),
        (["--bundle", "/nowhere"], "/nowhere is not a bundle: it has no recipe.yaml"),
    ],
)
def test_what_a_user_got_wrong_is_said_in_one_line(bundle, tmp_path, capsys, arguments, message):
    out = tmp_path / "samples.png"
    assert sample(["--bundle", str(bundle), "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.long
def test_real_pictures_are_nearer_to_real_ones_than_noise_is(bundle, pictures, tmp_path):
    out = tmp_path / "evaluation.json"
    arguments = [
        "--bundle", str(bundle), "--reference", str(pictures / "one"),
        "--real", str(pictures / "other"), "--num-reference", "60", "--num-pictures", "50",
        "--components", "8", "--feature-size", "32", "--out", str(out),
    ]  # fmt: skip
    assert evaluate(arguments) == 0
    measured = json.loads(out.read_text())
    assert 0 < measured["frechet_real"] < measured["frechet_generated"]
    assert measured["frechet_real"] < measured["frechet_noise"]
    assert (measured["num_reference"], measured["num_pictures"]) == (60, 50)


def test_more_pictures_than_there_are_is_an_error(bundle, pictures, capsys):
    arguments = ["--bundle", str(bundle), "--reference", str(pictures / "one")]
    assert evaluate([*arguments, "--real", str(pictures / "other")]) == 2
    assert "holds 60 rows, 2000 are wanted" in capsys.readouterr().err
