import threading
from itertools import islice

import numpy as np
import pytest
import torch

from tests.made import save_autoencoder, write_latents
from udiff.data.read import read_column
from udiff.data.storage import open_folder
from udiff.data.stream import Stream, prefetch
from udiff.settings import DataSettings

ROWS = 400


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    save_autoencoder(folder / "autoencoder")
    manifest = write_latents(folder / "latents", autoencoder=folder / "autoencoder", rows=ROWS)
    return open_folder(folder / "latents"), manifest


def batches(cache, count, *, first_step=0, batch_size=32, **ranks):
    folder, manifest = cache
    stream = Stream(folder, manifest, ("latent_mean", "label"), DataSettings(lanes=4))
    generator = stream.batches(first_step, batch_size=batch_size, seed=7, **ranks)
    taken = list(islice(generator, count))
    generator.close()
    return taken


def test_one_epoch_holds_the_cache(cache):
    folder, manifest = cache
    means = torch.cat([batch["latent_mean"] for batch in batches(cache, 20, batch_size=20)])
    stored = torch.from_numpy(np.array(read_column(folder, manifest, "latent_mean", num_rows=ROWS)))
    assert means.dtype == torch.float16
    assert torch.equal(means.flatten(1).unique(dim=0), stored.flatten(1).unique(dim=0))


def test_columns_stay_together(cache):
    folder, manifest = cache
    stored = read_column(folder, manifest, "latent_mean", num_rows=ROWS)
    labels = read_column(folder, manifest, "label", num_rows=ROWS)
    label_of = {mean.tobytes(): label for mean, label in zip(stored, labels, strict=True)}
    for batch in batches(cache, 3):
        for mean, label in zip(batch["latent_mean"], batch["label"], strict=True):
            assert label_of[mean.numpy().tobytes()] == label


def test_a_seek_gives_what_a_replay_gives(cache):
    replayed = batches(cache, 30)[25:]
    for one, other in zip(replayed, batches(cache, 5, first_step=25), strict=True):
        assert torch.equal(one["latent_mean"], other["latent_mean"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one(cache, world_size):
    parts = [batches(cache, 15, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, whole in enumerate(batches(cache, 15)):
        dealt = torch.stack([part[step]["latent_mean"] for part in parts], 1).flatten(0, 1)
        assert torch.equal(dealt, whole["latent_mean"])


def test_a_column_that_is_not_there_is_named(cache):
    folder, manifest = cache
    with pytest.raises(ValueError, match=r"cache of latents: it has no column image"):
        Stream(folder, manifest, ("image",), DataSettings())


def test_prefetch_passes_errors_on_and_ends_its_thread():
    def items():
        yield 1
        raise RuntimeError("disk on fire")

    generator = prefetch(items, depth=2)
    assert next(generator) == 1
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(generator)
    endless = prefetch(lambda: iter(int, 1), depth=2)
    next(endless)
    endless.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
