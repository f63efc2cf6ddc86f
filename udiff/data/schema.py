"""Columns of the caches, readable by pyarrow, `datasets`, pandas and DuckDB alone.

Tensors are fixed-size lists of float16, of which neither a list nor an element can be null; their
shape is in the field's metadata (`shape`, a JSON list) and in the manifest. Pictures are PNG bytes.
"""

import io
import json
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

NO_LABEL = -1
"""Label of a row that has none: a plain number, since a column with nulls is no numpy integers."""

_SAMPLE = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("label", pa.int64(), nullable=False),
    pa.field("caption", pa.string(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),  # of the picture before cropping
    pa.field("height", pa.int32(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
)

REJECTED_SCHEMA = pa.schema(
    [
        pa.field(name, pa.string(), nullable=False)
        for name in ("key", "source", "stage", "reason", "detail")
    ]
)
"""Columns of the rows that are in no cache, and why."""


def pictures_schema(size: int) -> pa.Schema:
    """Describe a cache of square pictures: `image` holds PNG bytes, uint8 RGB once decoded."""
    return pa.schema([*_SAMPLE, image_field((size, size, 3))])


def latents_schema(shape: Sequence[int], *, image_shape: Sequence[int] | None = None) -> pa.Schema:
    """Describe a cache of latents (channels, height, width): raw posterior means, log variances.

    With `image_shape` the pictures that they were made from stand beside them.
    """
    fields = [*_SAMPLE, *(tensor_field(name, shape) for name in ("latent_mean", "latent_logvar"))]
    if image_shape is not None:
        fields.append(image_field(image_shape))
    return pa.schema(fields)


def image_field(shape: Sequence[int]) -> pa.Field:
    """Describe the column of pictures: PNG bytes, uint8 (height, width, 3) once decoded."""
    return pa.field("image", pa.binary(), nullable=False, metadata=_shape_metadata(shape))


def tensor_field(name: str, shape: Sequence[int]) -> pa.Field:
    """Describe a column of float16 tensors of one shape."""
    element = pa.field("element", pa.float16(), nullable=False)
    kind = pa.list_(element, math.prod(shape))
    return pa.field(name, kind, nullable=False, metadata=_shape_metadata(shape))


def tensor_column(field: pa.Field, values: np.ndarray) -> pa.Array:
    """Lay float16 values (rows, *shape) out as a column of `field`, without a copy."""
    flat = pa.array(np.ascontiguousarray(values, np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=field.type)


def field_shape(field: pa.Field) -> tuple[int, ...]:
    """Read the shape of one row of a column; () for a plain value."""
    return tuple(json.loads((field.metadata or {}).get(b"shape", b"[]")))


def column_values(column: pa.ChunkedArray | pa.Array, field: pa.Field) -> np.ndarray | list[str]:
    """Turn a column into what training uses.

    Tensors become float16 (rows, *shape) without a copy where the column is one chunk, so maybe
    read-only; pictures are decoded to uint8 (rows, height, width, 3); numbers become an array of
    their type, strings a list.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_fixed_size_list(field.type):
        return column.flatten().to_numpy().reshape(len(column), *field_shape(field))
    if pa.types.is_binary(field.type):
        pictures = [decode_png(picture) for picture in column.to_pylist()]
        return np.stack(pictures) if pictures else np.empty((0, *field_shape(field)), np.uint8)
    if pa.types.is_string(field.type):
        return column.to_pylist()
    return column.to_numpy(zero_copy_only=False)


def decode_png(data: bytes) -> np.ndarray:
    """Decode a cached picture to uint8 (height, width, 3)."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.array(image)


def _shape_metadata(shape: Sequence[int]) -> dict[str, str]:
    return {"shape": json.dumps(list(shape))}
