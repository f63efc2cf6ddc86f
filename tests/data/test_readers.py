"""A cache is read by what else reads parquet."""

import io

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from tests.made import LATENT, draw_pictures, save_autoencoder, write_latents, write_pictures
from udiff.data.schema import recaption_field


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A cache of twenty pictures, each with captions of a model."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, draw_pictures(20, 16), rows_per_file=8)
    for file in (folder / "data").iterdir():
        table = pq.read_table(file)
        captions = [["a wave", "a color"]] * (len(table) - 1) + [[]]
        field = recaption_field()
        pq.write_table(table.append_column(field, pa.array(captions, field.type)), file)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    save_autoencoder(folder / "autoencoder")
    write_latents(folder / "cache", autoencoder=folder / "autoencoder", rows=40)
    return folder / "cache"


def _datasets(cache, tmp_path):
    return load_dataset(
        "parquet", data_files=f"{cache}/data/*.parquet", split="train", cache_dir=str(tmp_path)
    )


def _picture(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def test_pictures_open_in_datasets_pandas_and_duckdb(pictures, tmp_path):
    wanted = draw_pictures(20, 16)
    rows = _datasets(pictures, tmp_path)
    frame = pd.read_parquet(pictures / "data")
    query = f"SELECT image, recaption[1], width FROM '{pictures}/data/*.parquet' ORDER BY key"
    found = duckdb.sql(query).fetchall()
    assert len(rows) == len(frame) == len(found) == 20
    for number in (0, 9, 19):
        for png in (rows[number]["image"], frame["image"][number], found[number][0]):
            np.testing.assert_array_equal(_picture(png), wanted[number])
    assert rows[0]["recaption"] == frame["recaption"][0].tolist() == ["a wave", "a color"]
    assert found[0][1:] == ("a wave", 16)


def test_latents_open_in_datasets_pandas_and_duckdb(latents, tmp_path):
    wanted = np.stack(pq.read_table(latents / "data")["latent_mean"].to_numpy(False))
    rows = _datasets(latents, tmp_path).with_format("numpy")
    np.testing.assert_array_equal(np.stack(rows["latent_mean"]).reshape(wanted.shape), wanted)
    frame = pd.read_parquet(latents / "data")
    np.testing.assert_array_equal(np.stack(frame["latent_mean"]), wanted)
    assert wanted[0].size == np.prod(LATENT)
    query = f"SELECT latent_mean, label FROM '{latents}/data/*.parquet' ORDER BY key"
    mean, label = duckdb.sql(query).fetchall()[0]
    np.testing.assert_array_equal(np.array(mean, np.float16), wanted[0])
    assert label == 0
