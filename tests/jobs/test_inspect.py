"""`python -m jobs.inspect` on what every step leaves."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from jobs.fashion_mnist import make_sample, with_broken, write_shards
from jobs.inspect import main
from pipelines.summary import count_words, find_examples, summarize
from tests.captioner import save_captioner
from tests.made import draw_pictures, save_autoencoder, write_latents, write_pictures


def _pictures_of(page):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("autoencoder") / "bundle"
    save_autoencoder(path)
    return path


def test_pictures_are_counted_and_shown_beside_their_reconstructions(autoencoder, tmp_path, capsys):
    write_pictures(tmp_path / "cache", draw_pictures(30, 32), rows_per_file=8)
    page = tmp_path / "out" / "look.html"
    arguments = ["--input", str(tmp_path / "cache"), "--page", str(page), "--examples", "5"]
    assert main([*arguments, "--autoencoder", str(autoencoder)]) == 0
    out = capsys.readouterr().out
    assert "pictures, finished: 30 in = 30 here + 0 rejected; 4 files" in out
    assert re.search(r"<= 64\s.*30", out)
    pictures = _pictures_of(page)
    assert [picture.shape for picture in pictures] == [(32, 32, 3)] * 10
    assert page.read_text().count("a picture that was made") == 5
    np.testing.assert_array_equal(pictures[0], draw_pictures(30, 32)[0])


def test_latents_are_shown_decoded(autoencoder, tmp_path, capsys):
    write_latents(tmp_path / "cache", autoencoder=autoencoder, rows=50, rows_per_file=20)
    page = tmp_path / "look.html"
    arguments = ["--input", str(tmp_path / "cache"), "--page", str(page), "--examples", "4"]
    assert main([*arguments, "--autoencoder", str(autoencoder)]) == 0
    assert "latents, finished: 50 in = 50 here" in capsys.readouterr().out
    assert len(_pictures_of(page)) == 4
    assert "class 9" in page.read_text()


def _shards(folder):
    file = io.BytesIO()
    Image.fromarray(draw_pictures(1, 90)[0]).save(file, "JPEG")
    samples = [make_sample(file.getvalue(), f"number {n} <b>", 0) for n in range(20)]
    write_shards(folder, with_broken(samples), 9)
    return folder


def test_shards_are_counted_by_their_statistics(tmp_path, capsys):
    folder = _shards(tmp_path / "shards")
    page = tmp_path / "look.html"
    assert main(["--input", str(folder), "--page", str(page), "--examples", "6"]) == 0
    out = capsys.readouterr().out
    assert "shards, finished: 27 in" in out
    assert len(_pictures_of(page)) >= 4
    assert "number 0 &lt;b&gt;" in page.read_text()
    assert main(["--input", str(folder), "--page", str(page), "--autoencoder", "x"]) == 2
    assert "reconstructs cached pictures" in capsys.readouterr().err


def test_an_unfinished_cache_is_counted_as_far_as_it_is(tmp_path, capsys):
    write_pictures(tmp_path, draw_pictures(30, 32), rows_per_file=8)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "units" / "00008.json").unlink()
    assert main(["--input", str(tmp_path)]) == 0
    assert "not finished: 22 in = 22 here" in capsys.readouterr().out


def test_tokens_are_counted_with_a_tokenizer(tmp_path, capsys):
    write_pictures(tmp_path / "cache", draw_pictures(4, 32))
    tokenizer = save_captioner(tmp_path / "captioner", steps=0)
    assert main(["--input", str(tmp_path / "cache"), "--tokenizer", tokenizer]) == 0
    assert "caption (tokens)" in capsys.readouterr().out


def test_examples_come_from_all_over_the_cache(tmp_path):
    write_pictures(tmp_path, draw_pictures(30, 32), rows_per_file=8)
    keys = [int(example.key) for example in find_examples(str(tmp_path), 4)]
    assert keys == [0, 9, 19, 29]


def test_what_is_no_cache_is_refused(tmp_path, capsys):
    assert main(["--input", str(tmp_path)]) == 2
    assert "holds no cache and no shards" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        summarize(str(tmp_path), count=count_words)
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 0}))
    assert main(["--input", str(tmp_path)]) == 2
