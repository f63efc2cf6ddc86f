"""Every column that a latents cache can have, made of real pictures by small real encoders."""

import os
import pickle
import shutil
import signal
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from timm.models import VisionTransformer

from jobs.cluster import connect
from jobs.prepare import prepare_latents
from pipelines.encoders import Encoders, feature_columns
from pipelines.latents import LatentsChain, ReadPictures, count_decoders, plan_latents
from pipelines.latents_settings import FeatureSettings, LatentsSettings
from pipelines.picture_files import hash_file, open_pictures
from pipelines.schedule import Readers, Workers, run_units
from pipelines.stages.encode_image import EncodeImage
from pipelines.update import carry_over, find_kept
from tests.made import draw_pictures, save_autoencoder, save_t5, write_pictures
from udiff.autoencoders.pixels import to_pixels
from udiff.bundle import load_autoencoder
from udiff.data.manifest import committed_units, finish, read_manifest
from udiff.data.schema import column_values
from udiff.data.storage import open_folder
from udiff.data.stream import Stream
from udiff.encoders.dinov2 import DINOv2
from udiff.encoders.t5 import load_t5
from udiff.settings import DataSettings, T5Settings

CAPTIONS = ("a red cat", "the dog", "a cat on a red bus")
ROWS = 14


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write_pictures(folder / "pictures", draw_pictures(ROWS, 32), rows_per_file=8, captions=CAPTIONS)
    save_autoencoder(folder / "autoencoder")
    save_t5(folder / "t5")
    return folder


def _settings(made, output, **changes):
    text = {"name": "t5", "encoder": "t5", "path": str(made / "t5"), "max_tokens": 7}
    return LatentsSettings(
        **{
            "input": str(made / "pictures"),
            "output": str(output),
            "autoencoder": str(made / "autoencoder"),
            "texts": [text],
            "batch_size": 4,
            "row_group_size": 4,
            **changes,
        }
    )


def _make(settings):
    plan = plan_latents(settings)
    chain = LatentsChain(settings, plan)
    units = open_pictures(settings.input).units()
    for unit in units:
        chain(unit)
    return finish(open_folder(settings.output), plan, [unit.name for unit in units])


def _column(folder, name):
    table = pq.read_table(folder / "data")
    return column_values(table[name], table.schema.field(name))


def test_a_text_has_the_states_of_its_own_tokens(made, tmp_path):
    manifest = _make(_settings(made, tmp_path))
    assert manifest.shapes["t5"] == (7, 24)
    stream = Stream(open_folder(tmp_path), manifest, ("t5", "latent_mean"), DataSettings())
    batches = stream.batches(0, batch_size=ROWS, seed=0)
    batch = next(batches)
    batches.close()
    encoder = load_t5(T5Settings(path=str(made / "t5")))
    ids = encoder.tokenize(CAPTIONS, 7)
    with torch.inference_mode():
        states = encoder.encode(ids).half()
    counts = encoder.count_tokens(ids).tolist()
    wanted = [states[k, :count] for k, count in enumerate(counts)]
    for row, length in zip(batch["t5"], batch["t5_length"].tolist(), strict=True):
        found = [torch.allclose(row[:length], each, atol=1e-3) for each in wanted
                 if len(each) == length]  # fmt: skip
        assert any(found)
        assert not row[length:].any()
    assert sorted(batch["t5_length"].tolist()) == sorted((counts * 5)[:ROWS])


def test_tokens_are_those_of_the_encoder_filled_up_as_it_does(made, tmp_path):
    text = {"name": "t5", "encoder": "t5", "path": str(made / "t5"), "max_tokens": 5}
    _make(_settings(made, tmp_path, texts=[{**text, "store": "tokens", "pad": "end"}]))
    ids = load_t5(T5Settings(path=str(made / "t5"), pad="end")).tokenize(CAPTIONS, 5)
    found = _column(tmp_path, "t5_tokens")
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, ids[torch.arange(ROWS) % 3])
    assert not (tmp_path / "texts").exists()


def test_states_of_captions_may_be_called_caption(made, tmp_path):
    text = {"name": "caption", "encoder": "t5", "path": str(made / "t5"), "max_tokens": 5}
    manifest = _make(_settings(made, tmp_path, texts=[text]))
    batches = Stream(open_folder(tmp_path), manifest, ("caption",), DataSettings()).batches(
        0, batch_size=3, seed=0
    )
    assert next(batches)["caption"].shape == (3, 5, 24)
    batches.close()
    assert _column(tmp_path, "caption")[:2] == list(CAPTIONS[:2])


def test_texts_alone_need_no_autoencoder_and_look_at_no_picture(made, tmp_path):
    manifest = _make(_settings(made, tmp_path, autoencoder=None))
    assert set(manifest.shapes) == {"t5"}
    assert manifest.latent_statistics is None
    assert _column(tmp_path, "caption") == [CAPTIONS[n % 3] for n in range(ROWS)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("int8", 1 / 120)])
def test_latents_are_stored_in_the_type_that_is_asked_for(made, tmp_path, dtype, tolerance):
    _make(_settings(made, tmp_path / "half", texts=[]))
    _make(_settings(made, tmp_path / dtype, texts=[], dtype=dtype))
    wanted = _column(tmp_path / "half", "latent_mean").astype(np.float32)
    found = _column(tmp_path / dtype, "latent_mean")
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def test_mirrored_pictures_have_latents_of_their_own(made, tmp_path):
    manifest = _make(_settings(made, tmp_path, texts=[], flip=True))
    assert {"latent_mean_flipped", "latent_logvar_flipped"} <= set(manifest.shapes)
    pictures = torch.from_numpy(draw_pictures(ROWS, 32))
    with torch.inference_mode():
        autoencoder = load_autoencoder(str(made / "autoencoder"))
        wanted = autoencoder.encode_moments(to_pixels(pictures.flip(2))).mean
    np.testing.assert_allclose(_column(tmp_path, "latent_mean_flipped"), wanted, atol=5e-3)


def test_drawn_latents_are_read_as_moments_without_variance(made, tmp_path):
    manifest = _make(_settings(made, tmp_path, texts=[], latent="sample"))
    columns = ("latent_mean", "latent_logvar", "label")
    stream = Stream(open_folder(tmp_path), manifest, columns, DataSettings())
    batches = stream.batches(0, batch_size=ROWS, seed=0)
    batch = next(batches)
    batches.close()
    assert set(batch) == set(columns)
    stored = torch.from_numpy(np.array(_column(tmp_path, "latent")))
    assert torch.equal(
        batch["latent_mean"].flatten(1).unique(dim=0), stored.flatten(1).unique(dim=0)
    )
    assert (batch["latent_logvar"].float().exp() < 1e-12).all()


def _latents_by_key(folder, settings, count=3, **ranks):
    stream = Stream(open_folder(folder), read_manifest(folder), ("latent_mean", "image"), settings)
    batches = stream.batches(0, batch_size=ROWS, seed=5, **ranks)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def test_training_takes_the_mirrored_picture_of_every_other_sample(made, tmp_path):
    _make(_settings(made, tmp_path, texts=[], flip=True, keep_image=True))
    plain, flipped = (
        _latents_by_key(tmp_path, DataSettings(flip=flip), count=8) for flip in (False, True)
    )
    share = []
    autoencoder = load_autoencoder(str(made / "autoencoder"))
    for one, other in zip(plain, flipped, strict=True):
        assert set(one) == set(other)
        for before, after in zip(one["image"], other["image"], strict=True):
            share.append(not torch.equal(before, after))
            assert torch.equal(after, before.flip(1)) or torch.equal(after, before)
        with torch.inference_mode():
            wanted = autoencoder.encode_moments(to_pixels(other["image"])).mean
        torch.testing.assert_close(other["latent_mean"].float(), wanted, atol=5e-3, rtol=0)
    assert 0.3 < np.mean(share) < 0.7
    halves = [
        _latents_by_key(tmp_path, DataSettings(flip=True), rank=rank, world_size=2)
        for rank in range(2)
    ]
    for step in range(3):
        dealt = torch.stack([half[step]["latent_mean"] for half in halves], 1).flatten(0, 1)
        assert torch.equal(dealt, flipped[step]["latent_mean"])


def test_flipping_needs_mirrored_columns(made, tmp_path):
    manifest = _make(_settings(made, tmp_path, texts=[]))
    with pytest.raises(ValueError, match=r"data\.flip needs columns .* latents --flip"):
        Stream(open_folder(tmp_path), manifest, ("latent_mean",), DataSettings(flip=True))


def test_samples_are_draws_of_the_posteriors_and_the_same_every_time(made, tmp_path):
    one = _make(_settings(made, tmp_path / "one", texts=[], latent="sample"))
    _make(_settings(made, tmp_path / "again", texts=[], latent="sample", batch_size=8))
    _make(_settings(made, tmp_path / "other", texts=[], latent="sample", seed=1))
    _make(_settings(made, tmp_path / "moments", texts=[]))
    sample, again, other = (_column(tmp_path / n, "latent") for n in ("one", "again", "other"))
    mean, logvar = (_column(tmp_path / "moments", f"latent_{n}") for n in ("mean", "logvar"))
    noise = (sample.astype(np.float32) - mean) / np.exp(logvar.astype(np.float32) / 2)
    np.testing.assert_allclose((noise.mean(), noise.std()), (0, 1), atol=0.05)
    np.testing.assert_allclose(sample, again, atol=5e-3)
    assert np.abs(sample - other).mean() > 0.01
    np.testing.assert_allclose(one.latent_statistics.std, sample.std((0, 2, 3)), rtol=5e-3)


def test_features_stand_beside_latents_in_one_pass(made):
    torch.manual_seed(0)
    transformer = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=24, depth=1, num_heads=2, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip
    encoder = DINOv2(transformer)
    feature = FeatureSettings(path="made", dtype="int8")
    columns = feature_columns(feature, encoder)
    encode = EncodeImage([columns], device="cpu", precision="fp32")
    assert encode.shapes(32, 32) == {"dino_feature": (4, 24)}
    pictures = open_pictures(str(made / "pictures"))
    read = ReadPictures(pictures, batch_size=4, decodes=True, keep_image=False)
    rows = encode(read.stream(pictures.units()[0]).batches)
    images = torch.from_numpy(draw_pictures(ROWS, 32)[:8]).permute(0, 3, 1, 2) / 255
    found = np.stack([row["dino_feature"] for row in rows.kept])
    np.testing.assert_allclose(found, encoder(images), atol=1e-4)
    (field,) = Encoders(_settings(made, "x", texts=[]), (columns,), (), {}).fields(
        {"dino_feature": (4, 24)}
    )
    assert field.metadata == {b"shape": b"[4, 24]", b"dtype": b"int8"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "bfloat16"}, r'identity\.latent\.stored is "float16", wanted "bfloat16"'),
        ({"latent": "sample"}, r"identity\.latent\.content"),
        ({"precision": "bf16"}, r"identity\.latent\.dtype"),
        ({"flip": True}, r"shapes\.latent_mean_flipped is missing"),
    ],
)
def test_a_cache_of_another_make_is_not_continued(made, tmp_path, changes, named):
    _make(_settings(made, tmp_path, texts=[]))
    with pytest.raises(ValueError, match=named):
        plan_latents(_settings(made, tmp_path, texts=[], **changes))


def test_texts_of_another_encoder_are_not_continued(made, tmp_path):
    _make(_settings(made, tmp_path / "out", autoencoder=None))
    save_t5(tmp_path / "other", seed=9)
    text = {"name": "t5", "encoder": "t5", "path": str(tmp_path / "other"), "max_tokens": 6}
    with pytest.raises(ValueError, match=r"identity\.t5\.encoder is .*t5\.max_tokens is 7"):
        plan_latents(_settings(made, tmp_path / "out", autoencoder=None, texts=[text]))


def _update(settings):
    """Do what `make_latents` does with `update`, without Ray; names the units that were made."""
    pictures, folder, plan = (
        open_pictures(settings.input),
        open_folder(settings.output),
        plan_latents(settings),
    )
    kept = find_kept(
        folder,
        plan,
        {"pictures": pictures.units()},
        lambda us: [hash_file(pictures.folder, u) for u in us],
    )
    carry_over(folder, plan, kept)
    chain, made = LatentsChain(settings, plan), []
    for unit in pictures.units():
        if unit.name not in committed_units(folder):
            chain(unit)
            made.append(unit.name)
    finish(folder, plan, [unit.name for unit in pictures.units()])
    return made


def test_after_a_caption_changed_only_its_file_is_encoded_again(made, tmp_path):
    drawn = draw_pictures(ROWS, 32)
    write_pictures(tmp_path / "in", drawn, rows_per_file=5, captions=CAPTIONS)
    paths = {"input": str(tmp_path / "in"), "update": True}
    _make(_settings(made, tmp_path / "out", **paths))
    changed = [CAPTIONS[n % 3] for n in range(ROWS)]
    changed[7] = "a bus"
    shutil.rmtree(tmp_path / "in")
    write_pictures(tmp_path / "in", drawn, rows_per_file=5, captions=changed)
    (plan := tmp_path / "in" / "plan.json").write_text(plan.read_text().replace("14", "15"))
    with pytest.raises(ValueError, match=r"inputs\.pictures is"):
        plan_latents(_settings(made, tmp_path / "out", **paths | {"update": False}))
    assert _update(_settings(made, tmp_path / "out", **paths)) == ["00005"]
    _make(_settings(made, tmp_path / "fresh", **paths))
    assert _files(tmp_path / "out") == _files(tmp_path / "fresh")


@pytest.mark.parametrize("changes", [{}, {"keep_image": True}, {"autoencoder": None}])
def test_pictures_that_another_process_decoded_make_the_same_bytes(made, tmp_path, changes):
    shutil.copytree(made / "pictures", tmp_path / "in")
    damaged = tmp_path / "in" / "data" / "00000.parquet"
    table = pq.read_table(damaged)
    rows = table.to_pylist()
    rows[1]["image"] = rows[1]["image"][:50]
    pq.write_table(table.from_pylist(rows, schema=table.schema), damaged)
    whole, split = (
        _settings(made, tmp_path / name, input=str(tmp_path / "in"), **changes)
        for name in ("whole", "split")
    )
    _make(whole)
    chain, pictures = LatentsChain(split, plan_latents(split)), open_pictures(split.input)
    read = ReadPictures(
        pictures, batch_size=4, decodes=split.encodes_pictures, keep_image=split.keep_image
    )
    for unit in pictures.units():
        chain.finish(unit, pickle.loads(pickle.dumps(read(unit))))
    finish(open_folder(split.output), plan_latents(split), [u.name for u in pictures.units()])
    assert _files(tmp_path / "whole") == _files(tmp_path / "split")


def test_decoders_are_chosen_where_they_are_of_use(made, tmp_path):
    pictures = open_pictures(str(made / "pictures"))
    shapes = {"image": (8192, 8192, 3)}
    large = replace(pictures, manifest=pictures.manifest.model_copy(update={"shapes": shapes}))
    asked, free = (_settings(made, tmp_path, decoders=number) for number in (2, None))
    assert (count_decoders(asked, pictures), count_decoders(free, pictures)) == (2, None)
    assert (count_decoders(asked, large), count_decoders(free, large)) == (2, 0)
    texts = _settings(made, tmp_path, decoders=2, autoencoder=None)
    assert count_decoders(texts, pictures) == 0


@dataclass(frozen=True)
class _Deadly(ReadPictures):
    """Kills its process where it first reads the second unit."""

    mark: str = ""

    def __call__(self, unit):
        if unit.name == "00008" and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(unit)


@pytest.mark.ray
@pytest.mark.long
def test_a_decoder_that_is_killed_leaves_no_trace(made, tmp_path):
    _make(_settings(made, tmp_path / "whole"))
    settings = _settings(made, tmp_path / "split")
    plan, pictures = plan_latents(settings), open_pictures(settings.input)
    connect()
    run_units(
        partial(LatentsChain, settings, plan),
        pictures.units(),
        folder=open_folder(settings.output),
        plan=plan,
        stage="latents",
        workers=Workers(1),
        readers=Readers(_Deadly(pictures, 4, True, False, mark=str(tmp_path / "mark")), 1),
    )
    assert (tmp_path / "mark").exists()
    assert _files(tmp_path / "whole") == _files(tmp_path / "split")


@pytest.mark.ray
@pytest.mark.long
def test_a_job_with_decoders_makes_the_bytes_of_one_without(made, tmp_path):
    _make(_settings(made, tmp_path / "whole"))
    prepare_latents(_settings(made, tmp_path / "split", workers=1, decoders=1))
    assert _files(tmp_path / "whole") == _files(tmp_path / "split")


def _files(folder):
    return {
        file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def test_what_cannot_be_encoded_is_named(made, tmp_path):
    text = {"encoder": "t5", "path": str(made / "t5"), "max_tokens": 5}
    with pytest.raises(ValueError, match="'recaption' is no column"):
        plan_latents(_settings(made, tmp_path, texts=[{**text, "source": "recaption"}]))
    with pytest.raises(ValueError, match="two columns have the name text"):
        _settings(made, tmp_path, texts=[text, text])
    with pytest.raises(ValueError, match="nothing to encode"):
        _settings(made, tmp_path, texts=[], autoencoder=None)
