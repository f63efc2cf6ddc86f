"""Optimus: texts in and out, seeds, files."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.convert import to_bundle, to_official
from tests.made import save_optimus
from udiff.autoencoders.optimus import (
    Optimus,
    OptimusSettings,
    TransformerSettings,
    filter_logits,
)
from udiff.autoencoders.optimus_checkpoint import TextAutoencoder, load_text_autoencoder
from udiff.autoencoders.optimus_text import train_optimus_tokenizer
from udiff.encoders.text import TextEncoder
from udiff.models.versatile.captions import clean_caption
from udiff.settings import EncoderSettings
from udiff.weights import WeightsError

TEXTS = ("a red apple", "Two cats, on a mat!", "don't stop", "na\u00efve \u6771\u4eac", "")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("optimus") / "bundle"
    save_optimus(folder, TEXTS)
    return folder


@pytest.fixture(scope="module")
def texts(bundle) -> TextAutoencoder:
    return load_text_autoencoder(EncoderSettings(path=str(bundle)))


def test_it_is_a_text_encoder_of_one_token(texts):
    assert isinstance(texts, TextEncoder)
    states = texts.encode(texts.tokenize(TEXTS, 20))
    assert states.shape == (len(TEXTS), 1, texts.width)
    torch.testing.assert_close(states[:, 0], texts.encode_texts(TEXTS))


def test_a_bundle_carries_its_vocabularies(bundle):
    assert (bundle / "tokenizers" / "vocab.txt").is_file()


def test_texts_longer_than_its_positions_are_an_error_that_names_them():
    sizes = TransformerSettings(
        vocab_size=20, dim=8, depth=1, num_heads=1, hidden_dim=8, num_positions=6
    )
    optimus = Optimus(OptimusSettings(latent_dim=4, encoder=sizes, decoder=sizes))
    ids, latent = torch.ones(2, 7, dtype=torch.long), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"encoder\.num_positions is 6, but 7 positions"):
        optimus.encoder(ids)
    assert optimus.decoder(ids[:, :5], latent).shape == (2, 5, 20)
    with pytest.raises(ValueError, match=r"decoder\.num_positions is 6, but 7 positions"):
        optimus.decoder(ids[:, :6], latent)


def test_a_text_depends_on_its_seed_and_not_on_its_neighbors(texts):
    latent = torch.randn(3, texts.width, generator=torch.Generator().manual_seed(0))
    together = texts.optimus.generate(latent, seeds=[1, 2, 3], max_tokens=12)
    alone = [texts.optimus.generate(latent[i : i + 1], seeds=[i + 1], max_tokens=12)[0]
             for i in range(3)]  # fmt: skip
    assert together == alone
    assert together != texts.optimus.generate(latent, seeds=[4, 5, 6], max_tokens=12)
    end = texts.tokenizer.pad_id + 2
    assert all(text.count(end) == 1 and text[-1] == end for text in together)


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_byte_pairs_hold_every_text(text):
    tokenizer = _TOKENIZER
    ids = [tokenizer.pad_id + 1, *tokenizer.byte_ids(text), tokenizer.pad_id + 2]
    raw = tokenizer._bytes.decode(ids[1:-1])
    assert raw.strip() == text.strip()
    assert tokenizer.encode([text]).shape == (1, 79)


_TOKENIZER = train_optimus_tokenizer(TEXTS, num_tokens=300)


def test_filters_keep_the_token_that_passes_the_sum():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert filter_logits(logits, top_k=0, top_p=0.6).isfinite().tolist() == [1, 1, 0, 0]
    assert filter_logits(logits, top_k=3, top_p=1.0).isfinite().tolist() == [1, 1, 1, 0]
    assert filter_logits(logits, top_k=3, top_p=0.1).isfinite().tolist() == [1, 0, 0, 0]


def test_official_files_and_back(bundle, tmp_path):
    to_official(bundle, tmp_path / "optimus.pth")
    official = torch.load(tmp_path / "optimus.pth", weights_only=True)
    assert torch.equal(
        official["decoder.lm_head.weight"], official["decoder.transformer.wte.weight"]
    )
    heads = tmp_path / "config.yaml"
    heads.write_text(f"tokenizers: {bundle / 'tokenizers'}\n")
    to_bundle("optimus", tmp_path / "optimus.pth", tmp_path / "again", config=heads)
    first = load_text_autoencoder(EncoderSettings(path=str(bundle))).state_dict()
    again = load_text_autoencoder(EncoderSettings(path=str(tmp_path / "again"))).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_other_bundles_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no bundle of family optimus"):
        load_text_autoencoder(EncoderSettings(path=str(tmp_path)))
    (tmp_path / "recipe.yaml").write_text("family: ddt\n")
    with pytest.raises(WeightsError, match="family ddt"):
        load_text_autoencoder(EncoderSettings(path=str(tmp_path)))


@given(st.lists(st.sampled_from(["a", "b,", "(c)", "d."]), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_clean_caption_repeats_no_word_at_once(words):
    cleaned = clean_caption(" ".join(words))
    assert clean_caption(cleaned) == cleaned
    kept = cleaned.split()
    assert all(one != other for one, other in pairwise(kept))
