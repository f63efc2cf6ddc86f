"""Both chains on real shards, called as an actor calls them but without Ray."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from jobs.fashion_mnist import CLASS_NAMES, make_sample, with_broken, write_shards
from pipelines.latents import LatentsChain, plan_latents
from pipelines.latents_settings import LatentsSettings
from pipelines.pictures import PicturesChain, PicturesSettings, plan_pictures
from pipelines.shards import Unit
from pipelines.source import open_source
from pipelines.stages.write import WriteUnit
from udiff.bundle import load_autoencoder
from udiff.data.manifest import finish, read_manifest
from udiff.data.schema import column_values, pictures_schema
from udiff.data.storage import open_folder

NUM_WHOLE = 20


def _png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _make_pictures(settings):
    source, output = open_source(settings.input), open_folder(settings.output)
    plan = plan_pictures(settings)
    schema = pictures_schema(settings.sizes[0], scores=settings.score.columns())
    write = WriteUnit(output, schema=schema, plan=plan.fingerprint, row_group_size=4)
    made_by = plan.identity["image"].get("scored_by")
    chain = PicturesChain(settings, source, write, made_by=made_by)
    cuts = [source.cut(output, *file, settings.unit_rows) for file in plan.inputs.items()]
    units = [unit for units in cuts for unit in units]
    for unit in units:
        chain(unit)
    return finish(output, plan, [unit.name for unit in units])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A cache made from two shards, of which some samples are broken."""
    folder = tmp_path_factory.mktemp("chains")
    samples = [make_sample(_png(n), f"a photo of {n}", n % 10) for n in range(NUM_WHOLE)]
    write_shards(folder / "shards", with_broken(samples), 15)
    settings = PicturesSettings(
        input=str(folder / "shards"),
        output=str(folder / "pictures"),
        size=32,
        fit="pad",
        class_names=CLASS_NAMES,
        unit_rows=7,
    )
    _make_pictures(settings)
    return folder / "pictures"


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A small diffusers autoencoder on disk."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("autoencoder")
    AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(path)
    return path


def test_every_sample_is_cached_or_rejected_with_its_reason(pictures):
    manifest = read_manifest(pictures)
    assert manifest.images_in == NUM_WHOLE + 7
    assert manifest.num_rows == NUM_WHOLE
    assert manifest.rejected == {
        "decode/bomb": 1,
        "decode/truncated": 1,
        "decode/unidentified": 1,
        "filter/bad_label": 1,
        "read/empty": 1,
        "read/missing_caption": 1,
        "read/missing_image": 1,
    }
    rejected = pq.read_table(pictures / "rejected").to_pylist()
    assert sorted(f"{row['stage']}/{row['reason']}" for row in rejected) == sorted(
        manifest.rejected
    )
    assert all(row["source"].startswith(("00000.tar/", "00001.tar/")) for row in rejected)


def test_cached_pictures_are_the_samples_in_order(pictures):
    table = pq.read_table(pictures / "data")
    images = column_values(table["image"], table.schema.field("image"))
    for number, image in enumerate(images):
        whole = np.asarray(Image.open(io.BytesIO(_png(number))).convert("RGB"))
        np.testing.assert_array_equal(image[2:30, 2:30], whole)
    assert table["caption"].to_pylist() == [f"a photo of {n}" for n in range(NUM_WHOLE)]
    assert table["label"].to_pylist() == [n % 10 for n in range(NUM_WHOLE)]
    assert set(table["width"].to_pylist()) == {28}


def test_row_groups_are_those_of_the_files(pictures):
    for file in read_manifest(pictures).files:
        metadata = pq.read_metadata(pictures / file.path)
        groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        assert tuple(groups) == file.row_groups
        assert sum(groups) == file.rows


def test_a_unit_of_which_all_rows_are_rejected_is_committed(tmp_path):
    write_shards(tmp_path / "in", [{**make_sample(b"", "a", 0)}] * 2 + [_whole()] * 2, 4)
    manifest = _make_pictures(
        PicturesSettings(
            input=str(tmp_path / "in"), output=str(tmp_path / "out"), size=28, unit_rows=2
        )
    )
    assert [file.path for file in manifest.files] == ["data/00000-00001.parquet"]
    assert manifest.rejected == {"read/empty": 2}


def _whole():
    return make_sample(_png(0), "a", 0)


def _latents_chain(pictures, autoencoder, output, **changes):
    paths = {"input": str(pictures), "output": str(output), "autoencoder": str(autoencoder)}
    settings = LatentsSettings(**{"batch_size": 4, "row_group_size": 4, **paths, **changes})
    plan = plan_latents(settings)
    return plan, LatentsChain(settings, plan)


def _units(pictures):
    files = read_manifest(pictures).files
    return [Unit(Path(file.path).stem, file.path, file.rows) for file in files]


def test_latents_are_the_moments_of_each_picture(pictures, autoencoder, tmp_path):
    plan, chain = _latents_chain(pictures, autoencoder, tmp_path)
    for unit in _units(pictures):
        chain(unit)
    manifest = finish(open_folder(tmp_path), plan, [unit.name for unit in _units(pictures)])
    made, table = pq.read_table(tmp_path / "data"), pq.read_table(pictures / "data")
    images = column_values(table["image"], table.schema.field("image"))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        moments = load_autoencoder(str(autoencoder)).encode_moments(pixels)
    for name, wanted in (("latent_mean", moments.mean), ("latent_logvar", moments.logvar)):
        found = column_values(made[name], made.schema.field(name))
        np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-3, atol=2e-3)
    assert made["key"] == table["key"]
    variance = moments.mean.var((0, 2, 3), correction=0) + moments.logvar.exp().mean((0, 2, 3))
    np.testing.assert_allclose(manifest.latent_statistics.std, variance.sqrt(), rtol=1e-3)
    assert manifest.identity["image"] == read_manifest(pictures).identity["image"]


def test_pictures_that_are_kept_stand_beside_their_latents(pictures, autoencoder, tmp_path):
    plan, chain = _latents_chain(pictures, autoencoder, tmp_path, keep_image=True)
    for unit in _units(pictures):
        chain(unit)
    manifest = finish(open_folder(tmp_path), plan, [unit.name for unit in _units(pictures)])
    made, table = pq.read_table(tmp_path / "data"), pq.read_table(pictures / "data")
    assert made["image"] == table["image"]
    assert manifest.shapes["image"] == (32, 32, 3)
    assert {"latent_mean", "latent_logvar"} <= set(made.column_names)


def test_a_damaged_picture_is_rejected_and_a_damaged_file_fails(pictures, autoencoder, tmp_path):
    copy = tmp_path / "pictures"
    for file in pictures.rglob("*.*"):
        (copy / file.relative_to(pictures)).parent.mkdir(parents=True, exist_ok=True)
        (copy / file.relative_to(pictures)).write_bytes(file.read_bytes())
    unit, other = _units(pictures)[:2]
    table = pq.read_table(copy / unit.source)
    rows = table.to_pylist()
    rows[1]["image"] = rows[1]["image"][:50]
    pq.write_table(table.from_pylist(rows, schema=table.schema), copy / unit.source)
    (copy / other.source).write_bytes((copy / other.source).read_bytes()[:-100])
    _, chain = _latents_chain(copy, autoencoder, tmp_path / "latents")
    entry = chain(unit)
    assert entry.rejected == {"decode/corrupt": 1}
    assert entry.files[0].rows == unit.num_samples - 1
    with pytest.raises(Exception, match=r"[Pp]arquet"):
        chain(other)
    pq.write_table(table.slice(0, 2), copy / other.source)
    with pytest.raises(ValueError, match="holds 2 rows, the manifest says"):
        chain(other)


def test_latents_of_an_overflowing_autoencoder_are_rejected(pictures, autoencoder, tmp_path):
    model = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        model.quant_conv.weight.mul_(1e8)
    model.save_pretrained(tmp_path / "huge")
    _, chain = _latents_chain(pictures, tmp_path / "huge", tmp_path / "latents")
    unit = _units(pictures)[0]
    assert chain(unit).rejected == {"encode/not_finite": unit.num_samples}


def test_latents_of_another_autoencoder_are_not_continued(pictures, autoencoder, tmp_path):
    _, chain = _latents_chain(pictures, autoencoder, tmp_path / "latents")
    chain(_units(pictures)[0])
    model = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        model.encoder.conv_in.bias.add_(1e-3)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"identity\.latent\.autoencoder is"):
        _latents_chain(pictures, tmp_path / "other", tmp_path / "latents")


def test_latents_are_not_made_from_latents(pictures, autoencoder, tmp_path):
    manifest = {**read_manifest(pictures).model_dump(), "kind": "latents"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="pictures are wanted"):
        _latents_chain(tmp_path, autoencoder, tmp_path / "more")
