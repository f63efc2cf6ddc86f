import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from udiff.data.schema import (
    NO_LABEL,
    column_values,
    field_shape,
    latents_schema,
    pictures_schema,
    tensor_column,
    tensor_field,
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
    field = pictures_schema(8).field("image")
    values = column_values(pa.array([png.getvalue()], pa.binary()), field)
    np.testing.assert_array_equal(values, image[None])


def test_labels_become_integers_and_captions_a_list():
    schema = latents_schema((4, 2, 2))
    labels = column_values(pa.array([3, NO_LABEL]), schema.field("label"))
    assert labels.dtype == np.int64
    assert column_values(pa.array(["a", "b"]), schema.field("caption")) == ["a", "b"]


@pytest.mark.parametrize("schema", [pictures_schema(8), latents_schema((4, 2, 2))])
def test_no_column_takes_nulls(schema):
    assert not any(field.nullable for field in schema)
