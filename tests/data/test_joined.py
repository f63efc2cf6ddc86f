"""Batches of several parts, each of a cache of its own."""

import numpy as np
import pytest
import torch

from tests.made import save_autoencoder, write_latents
from udiff.data.joined import JoinedStream, split_columns
from udiff.data.storage import open_folder
from udiff.data.stream import Stream
from udiff.settings import DataSettings

COLUMNS = ("latent_mean",)


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joined")
    save_autoencoder(folder / "vae")
    found = {}
    for part, rows in (("image", 40), ("text", 24)):
        manifest = write_latents(folder / part, autoencoder=folder / "vae", rows=rows)
        cache = open_folder(folder / part)
        found[part] = Stream(cache, manifest, COLUMNS, DataSettings(lanes=2))
    return found


def _read(stream, first_step: int, steps: int, **ranks) -> list[dict[str, torch.Tensor]]:
    batches = stream.batches(first_step, batch_size=8, seed=3, **ranks)
    found = [next(batches) for _ in range(steps)]
    batches.close()
    return found


def test_every_row_of_a_part_comes_once_an_epoch(streams):
    batches = _read(JoinedStream(streams), 0, 15)
    for part, steps, rows in (("image", 5, 40), ("text", 3, 24)):
        for epoch in range(15 // steps):
            seen = batches[epoch * steps : (epoch + 1) * steps]
            means = torch.cat([batch[f"{part}.latent_mean"] for batch in seen])
            assert len(np.unique(means.flatten(1).numpy(), axis=0)) == rows


def test_it_goes_on_where_it_was(streams):
    joined = JoinedStream(streams)
    for ours, theirs in zip(_read(joined, 4, 3), _read(joined, 0, 7)[4:], strict=True):
        assert ours.keys() == theirs.keys() == {"image.latent_mean", "text.latent_mean"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ranks_share_every_part(streams):
    joined = JoinedStream(streams)
    [whole] = _read(joined, 2, 1)
    ranks = [_read(joined, 2, 1, rank=rank, world_size=2)[0] for rank in range(2)]
    for name, values in whole.items():
        assert torch.equal(torch.stack([r[name] for r in ranks], 1).flatten(0, 1), values)


def test_parts_of_one_cache_come_in_orders_of_their_own(streams):
    joined = JoinedStream({"image": streams["image"], "text": streams["image"]})
    [batch] = _read(joined, 0, 1)
    assert not torch.equal(batch["image.latent_mean"], batch["text.latent_mean"])


def test_columns_are_grouped_by_their_part():
    assert split_columns(("image.a", "text.b", "image.c")) == {"image": ("a", "c"), "text": ("b",)}
