import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from udiff.data.packing import PACKED_DTYPES, pack
from udiff.data.schema import (
    NO_LABEL,
    column_values,
    field_shape,
    padded_texts,
    pictures_schema,
    tensor_column,
    tensor_field,
    text_fields,
)


def _through_parquet(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=3)
    return pq.read_table(pa.BufferReader(sink.getvalue()))


def test_tensors_survive_parquet_with_shape_and_without_nulls():
    values = np.random.default_rng(0).normal(size=(7, 4, 2, 3)).astype(np.float16)
    field = tensor_field("latent_mean", (4, 2, 3))
    table = _through_parquet(pa.table([tensor_column(field, values)], schema=pa.schema([field])))
    read = table.schema.field("latent_mean")
    assert not read.nullable
    assert not read.type.value_field.nullable
    assert field_shape(read) == (4, 2, 3)
    np.testing.assert_array_equal(column_values(table["latent_mean"], read), values)
    part = table["latent_mean"].slice(2, 4)
    np.testing.assert_array_equal(column_values(part, read), values[2:6])


def test_pictures_are_decoded_to_arrays():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    field = pictures_schema((8, 8)).field("image")
    values = column_values(pa.array([png.getvalue()], pa.binary()), field)
    np.testing.assert_array_equal(values, image[None])


def test_labels_become_integers_and_captions_a_list():
    schema = pictures_schema((8, 8))
    labels = column_values(pa.array([3, NO_LABEL]), schema.field("label"))
    assert labels.dtype == np.int64
    assert column_values(pa.array(["a", "b"]), schema.field("caption")) == ["a", "b"]


def test_no_column_takes_nulls():
    tensors = [tensor_field("latent_mean", (4, 2, 2)), tensor_field("dino_feature", (9, 2), "int8")]
    fields = [*pictures_schema((8, 8)), *tensors, *text_fields("t5", (5, 8), "float16")]
    assert not any(field.nullable for field in fields)


@pytest.mark.parametrize("dtype", ["bool", "int32", "int64", "float32"])
def test_numbers_of_any_type_survive_parquet(dtype):
    values = np.random.default_rng(0).integers(0, 2, (5, 3)).astype(dtype)
    field = tensor_field("t5_tokens", (3,), dtype)
    table = _through_parquet(pa.table([tensor_column(field, values)], schema=pa.schema([field])))
    read = column_values(table["t5_tokens"], table.schema.field("t5_tokens"))
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_packed_tensors_survive_parquet_as_nearly_as_their_type_allows(dtype, tolerance):
    values = np.random.default_rng(0).normal(size=(7, 4, 2, 3)).astype(np.float32)
    field = tensor_field("latent_mean", (4, 2, 3), dtype)
    table = _through_parquet(pa.table([tensor_column(field, values)], schema=pa.schema([field])))
    part = column_values(table["latent_mean"].slice(2, 4), table.schema.field("latent_mean"))
    largest = np.abs(values[2:6]).max((2, 3), keepdims=True)
    assert (np.abs(part - values[2:6]) <= tolerance * largest).all()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from(PACKED_DTYPES))
def test_texts_are_padded_with_zeros_behind_their_last_token(lengths, dtype):
    draw = np.random.default_rng(0)
    texts = [draw.normal(size=(length, 8)).astype(np.float16) for length in lengths]
    _, field = text_fields("t5", (5, 8), dtype)
    column = pa.array([b"before", *(pack(text, dtype).tobytes() for text in texts)], field.type)
    padded, found = padded_texts(column.slice(1), field)
    assert found.tolist() == lengths
    assert padded.shape == (len(texts), 5, 8)
    for text, row in zip(texts, padded, strict=True):
        np.testing.assert_allclose(row[: len(text)], text, atol=0.02)
        assert not row[len(text) :].any()
