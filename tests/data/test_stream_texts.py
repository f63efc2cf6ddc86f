"""Encoded texts and tokens from a cache of several units, as training reads them."""

from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.rows import Rows
from pipelines.shards import Unit
from pipelines.stages.write import TextColumn, WriteUnit
from udiff.data.manifest import Plan, finish, read_manifest, start_plan
from udiff.data.schema import tensor_field, text_fields
from udiff.data.storage import open_folder
from udiff.data.stream import Stream
from udiff.settings import DataSettings

MAX_TOKENS, WIDTH = 6, 8
CAPTIONS = ("a cat", "a dog on a mat", "two cats", "a bird", "the house is red")


def _encode(text: str) -> np.ndarray:
    """One token per word, told apart by the text."""
    draw = np.random.default_rng(list(text.encode()))
    return draw.normal(size=(len(text.split()), WIDTH)).astype(np.float16)


def _row(number: int) -> dict:
    caption, recaption = CAPTIONS[number % 5], CAPTIONS[number % 3]
    return {
        "number": number,
        "caption": caption,
        "recaption": recaption,
        "t5_states": _encode(caption),
        "t5_recaption_states": _encode(recaption),
        "t5_tokens": np.full(MAX_TOKENS, number),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = open_folder(tmp_path_factory.mktemp("texts"))
    rows, texts = zip(
        *(text_fields(name, (MAX_TOKENS, WIDTH), "float16") for name in ("t5", "t5_recaption")),
        strict=True,
    )
    fields = [pa.field(name, pa.string()) for name in ("caption", "recaption")]
    tokens = tensor_field("t5_tokens", (MAX_TOKENS,), "int32")
    plan = Plan(kind="latents", identity={}, options={}, inputs={}, shapes={})
    start_plan(folder, plan)
    write = WriteUnit(
        folder,
        schema=pa.schema([pa.field("number", pa.int64()), *fields, tokens, *rows]),
        texts=[TextColumn(texts[0], "caption"), TextColumn(texts[1], "recaption")],
        plan=plan.fingerprint,
        row_group_size=2,
    )
    for unit, start in (("a", 0), ("b", 7), ("c", 20)):
        rows_of_unit = [_row(start + k) for k in range(9)]
        write(Unit(unit, "made", 9), Rows(kept=rows_of_unit))
    finish(folder, plan, ["a", "b", "c"])
    return folder


def _epoch(cache, *columns):
    settings = DataSettings(lanes=3, window_row_groups=2)
    stream = Stream(cache, read_manifest(cache), ("number", *columns), settings)
    generator = stream.batches(0, batch_size=9, seed=1)
    batches = list(islice(generator, 3))
    generator.close()
    return batches


def test_each_row_has_the_tokens_of_its_own_texts_and_zeros_behind(cache):
    seen = []
    for batch in _epoch(cache, "t5", "t5_recaption", "t5_tokens"):
        assert batch["t5"].shape == (9, MAX_TOKENS, WIDTH)
        for k, number in enumerate(batch["number"].tolist()):
            seen.append(number)
            assert batch["t5_tokens"][k].tolist() == [number] * MAX_TOKENS
            for name, source in (("t5", "caption"), ("t5_recaption", "recaption")):
                wanted = _row(number)[f"{name}_states"]
                length = batch[f"{name}_length"][k]
                assert length == len(_row(number)[source].split())
                np.testing.assert_array_equal(batch[name][k, :length], wanted)
                assert not batch[name][k, length:].any()
    assert sorted(seen) == sorted(start + k for start in (0, 7, 20) for k in range(9))


def test_a_text_is_stored_once_in_its_unit(cache):
    for file in read_manifest(cache).files:
        with cache.open(file.texts.path) as stored:
            table = pq.read_table(stored)
        assert sorted(table["raw_text"].to_pylist()) == sorted(CAPTIONS)
        assert file.texts.rows == len(CAPTIONS) == sum(file.texts.row_groups)


def test_a_text_that_a_column_does_not_encode_takes_no_room(cache):
    with cache.open(read_manifest(cache).files[0].texts.path) as stored:
        table = pq.read_table(stored)
    for text, tokens in zip(
        *(table[n].to_pylist() for n in ("raw_text", "t5_recaption")), strict=True
    ):
        assert bool(tokens) == (text in CAPTIONS[:3])


def test_tokens_alone_do_not_touch_the_texts(cache):
    class NoTexts(type(cache)):
        def open(self, name):
            assert not name.startswith("texts/")
            return super().open(name)

    assert len(_epoch(NoTexts(cache.filesystem, cache.path), "t5_tokens")) == 3
