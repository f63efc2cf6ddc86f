"""Pictures of several sizes: from shards to batches, each of one shape."""

import io
from itertools import islice
from math import log

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs.fashion_mnist import make_sample, write_shards
from pipelines.dedup import DedupSettings, SignChain, plan_dedup
from pipelines.latents import LatentsChain, plan_latents
from pipelines.latents_settings import LatentsSettings
from pipelines.picture_files import open_pictures
from pipelines.pictures import PicturesChain, PicturesSettings, plan_pictures
from pipelines.source import open_source
from pipelines.stages.crop import Bucket, center_crop, crop_to_bucket, nearest_bucket
from pipelines.stages.write import WriteUnit
from tests.made import draw_pictures, save_autoencoder, save_t5
from udiff.data.manifest import finish, read_manifest
from udiff.data.schema import column_values, pictures_schema
from udiff.data.storage import open_folder
from udiff.data.stream import Stream
from udiff.settings import DataSettings

BUCKETS = ("32x32", "24x40", "40x24")
SIZES = [(60, 60), (30, 70), (80, 44), (33, 31), (50, 81), (64, 40), (90, 88)] * 4


def _sample(number: int, height: int, width: int) -> dict:
    picture = draw_pictures(1, max(height, width), seed=number)[0][:height, :width]
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return make_sample(file.getvalue(), f"picture {number}", number)


def _make_pictures(folder):
    write_shards(folder / "in", [_sample(n, *size) for n, size in enumerate(SIZES)], 14)
    settings = PicturesSettings(
        input=str(folder / "in"),
        output=str(folder / "pictures"),
        buckets=BUCKETS,
        unit_rows=10,
        row_group_size=3,
    )
    output, source = open_folder(settings.output), open_source(settings.input)
    plan = plan_pictures(settings)
    write = WriteUnit(
        output,
        schema=pictures_schema(settings.sizes[0]),
        buckets=plan.buckets,
        plan=plan.fingerprint,
        row_group_size=3,
    )
    chain = PicturesChain(settings, source, write, made_by=None)
    units = [unit for file in plan.inputs.items() for unit in source.cut(output, *file, 10)]
    for unit in units:
        chain(unit)
    return finish(output, plan, [unit.name for unit in units])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buckets")
    _make_pictures(folder)
    save_autoencoder(folder / "autoencoder")
    save_t5(folder / "t5")
    text = {"encoder": "t5", "path": str(folder / "t5"), "max_tokens": 5}
    settings = LatentsSettings(
        input=str(folder / "pictures"),
        output=str(folder / "latents"),
        autoencoder=str(folder / "autoencoder"),
        texts=[text],
        keep_image=True,
        row_group_size=3,
    )
    plan = plan_latents(settings)
    chain, units = LatentsChain(settings, plan), open_pictures(settings.input).units()
    for unit in units:
        chain(unit)
    finish(open_folder(settings.output), plan, [unit.name for unit in units])
    return folder


def test_each_bucket_has_files_of_its_own_shape(made):
    manifest = read_manifest(made / "pictures")
    assert manifest.num_rows == len(SIZES)
    assert {file.bucket for file in manifest.files} == set(BUCKETS)
    for file in manifest.files:
        table = pq.read_table(made / "pictures" / file.path)
        images = column_values(table["image"], table.schema.field("image"))
        assert images.shape[1:] == manifest.buckets[file.bucket]["image"]
        assert file.path.endswith(f".{file.bucket}.parquet")


def test_a_picture_goes_to_the_nearest_aspect_ratio(made):
    for file in read_manifest(made / "pictures").files:
        wanted = [int(side) for side in file.bucket.split("x")]
        for row in pq.read_table(made / "pictures" / file.path).to_pylist():
            aspects = {
                name: abs(log(row["height"] / row["width"] * w / h))
                for name in BUCKETS
                for h, w in [[int(side) for side in name.split("x")]]
            }
            assert min(aspects, key=aspects.get) == file.bucket, (row["height"], wanted)


def test_latents_have_the_shapes_of_their_buckets(made):
    manifest = read_manifest(made / "latents")
    assert manifest.all_shapes("latent_mean") == {(4, 8, 8), (4, 6, 10), (4, 10, 6)}
    assert manifest.shapes["text"] == (5, 24)
    for file in manifest.files:
        metadata = pq.read_metadata(made / "latents" / file.path)
        assert metadata.num_rows == file.rows
        assert file.texts is not None


def test_duplicates_are_dropped_from_pictures_of_any_size(made, tmp_path):
    settings = DedupSettings(input=str(made / "pictures"), output=str(tmp_path / "out"))
    signatures, plan = plan_dedup(settings)
    pictures = open_pictures(settings.input)
    sign = SignChain(settings, pictures, signatures)
    entries = [sign(unit) for unit in pictures.units()]
    assert sum(file.rows for entry in entries for file in entry.files) == len(SIZES)
    assert plan.buckets == pictures.manifest.buckets


def _steps(folder, count, first=0, batch_size=4, **ranks):
    cache, columns = open_folder(folder), ("latent_mean", "image", "text", "label")
    stream = Stream(cache, read_manifest(folder), columns, DataSettings(lanes=3))
    batches = stream.batches(first, batch_size=batch_size, seed=3, **ranks)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def test_every_batch_is_of_one_shape_and_an_epoch_uses_every_row(made):
    batches = _steps(made / "latents", 10)
    labels = [label for batch in batches for label in batch["label"].tolist()]
    assert set(labels) == set(range(len(SIZES)))
    for batch in batches:
        height, width = batch["latent_mean"].shape[2:]
        assert batch["image"].shape == (4, 4 * height, 4 * width, 3)
        assert batch["text"].shape == (4, 5, 24)
    assert len({batch["latent_mean"].shape for batch in batches}) == 3


def test_ranks_share_the_batch_of_one(made):
    whole = _steps(made / "latents", 8)
    parts = [_steps(made / "latents", 8, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        dealt = torch.stack([part[step]["latent_mean"] for part in parts], 1).flatten(0, 1)
        assert torch.equal(dealt, batch["latent_mean"])


def test_a_seek_gives_what_a_replay_gives(made):
    for one, other in zip(_steps(made / "latents", 12)[9:], _steps(made / "latents", 3, first=9),
                          strict=True):  # fmt: skip
        assert torch.equal(one["latent_mean"], other["latent_mean"])


@given(st.integers(1, 200), st.integers(1, 200))
def test_pictures_are_as_large_as_their_bucket(height, width):
    buckets = [Bucket(16, 16), Bucket(12, 20), Bucket(20, 12)]
    row = crop_to_bucket({"picture": Image.new("RGB", (width, height))}, buckets=buckets)
    assert f"{row['picture'].height}x{row['picture'].width}" == row["bucket"]


def test_of_one_aspect_ratio_the_largest_that_need_not_be_enlarged_is_taken():
    buckets = [Bucket(32, 32), Bucket(64, 64), Bucket(128, 128)]
    assert nearest_bucket(100, 90, buckets) == (64, 64)
    assert nearest_bucket(500, 500, buckets) == (128, 128)
    assert nearest_bucket(9, 9, buckets) == (32, 32)


def test_a_square_bucket_is_the_center_crop():
    picture = Image.fromarray(draw_pictures(1, 90)[0][:70])
    row = crop_to_bucket({"picture": picture}, buckets=[Bucket(32, 32)])
    np.testing.assert_array_equal(np.array(row["picture"]), np.array(center_crop(picture, 32)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "either size or buckets"),
        ({"size": 32, "buckets": ["32x32"]}, "either size or buckets"),
        ({"buckets": ["32x32", "32x32"]}, "must be different"),
        ({"buckets": ["32"]}, "buckets"),
        ({"buckets": ["32x24"], "fit": "pad"}, "fit must be crop"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PicturesSettings(input="in", output="out", **changes)
