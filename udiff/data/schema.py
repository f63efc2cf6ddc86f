"""Columns of the caches, readable by pyarrow, `datasets`, pandas and DuckDB alone.

Tensors are fixed-size lists of numbers, of which neither a list nor an element can be null; their
shape is in the field's metadata (`shape`, a JSON list) and in the manifest. Those of bfloat16 and
int8 are bytes (`udiff.data.packing`; `dtype` in the metadata), for which parquet has no compact
list. Pictures are PNG bytes.

Encoded texts stand beside the data file, in `texts/<unit>.parquet`: one row per distinct text of
the unit, with its real tokens alone. The data file's `<name>_row` counts the rows of that file. A
text that occurs in many units is stored once in each: a unit never reads another's files.
"""

import io
import json
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from udiff.data.packing import PACKED_DTYPES, PackedDtype, pack, slice_bytes, unpack

NO_LABEL = -1
"""Label of a row that has none: a plain number, since a column with nulls is no numpy integers."""

FLIPPED = "_flipped"
"""End of the names of columns that were made of the picture with left and right exchanged."""

Dtype = Literal["bool", "int32", "int64", "float16", "float32", "bfloat16", "int8"]
"""Element type of a stored tensor; bfloat16 and int8 are read as float32."""

_ARROW_TYPES: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float16": pa.float16(),
    "float32": pa.float32(),
}

SAMPLE = (
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


def pictures_schema(size: tuple[int, int], *, scores: Sequence[str] = ()) -> pa.Schema:
    """Describe a cache of pictures of a height and width.

    `image` holds PNG bytes, uint8 RGB once decoded.
    """
    scored = [pa.field(name, pa.float32(), nullable=False) for name in scores]
    return pa.schema([*SAMPLE, *scored, image_field((*size, 3))])


def conversation_field() -> pa.Field:
    """Describe the column of conversations: the JSON list of [question, answer]."""
    return pa.field("conversation", pa.string(), nullable=False)


def recaption_field() -> pa.Field:
    """Describe the column of captions that a model wrote: a list of strings."""
    element = pa.field("element", pa.string(), nullable=False)
    return pa.field("recaption", pa.list_(element), nullable=False)


def image_field(shape: Sequence[int]) -> pa.Field:
    """Describe the column of pictures: PNG bytes, uint8 (height, width, 3) once decoded."""
    return pa.field("image", pa.binary(), nullable=False, metadata=_metadata(shape))


def tensor_field(name: str, shape: Sequence[int], dtype: Dtype = "float16") -> pa.Field:
    """Describe a column of tensors of one shape."""
    match dtype:
        case "bfloat16" | "int8":
            kind = pa.binary(shape[0] * slice_bytes(shape[1:], dtype))
        case _:
            element = pa.field("element", _ARROW_TYPES[dtype], nullable=False)
            kind = pa.list_(element, math.prod(shape))
    return pa.field(name, kind, nullable=False, metadata=_metadata(shape, dtype))


def tensor_column(field: pa.Field, values: np.ndarray) -> pa.Array:
    """Lay values (rows, *shape) out as a column of `field`, of its element type."""
    if not pa.types.is_fixed_size_list(field.type):
        slices = pack(values.reshape(-1, *values.shape[2:]), field_dtype(field))
        return pa.FixedSizeBinaryArray.from_buffers(
            field.type, len(values), [None, pa.py_buffer(slices)]
        )
    element = field.type.value_type.to_pandas_dtype()
    flat = pa.array(np.ascontiguousarray(values, element).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=field.type)


def reshaped_field(field: pa.Field, shape: Sequence[int]) -> pa.Field:
    """Describe the same column of pictures or tensors, of another shape."""
    if pa.types.is_fixed_size_list(field.type):
        kind = pa.list_(field.type.value_field, math.prod(shape))
    elif pa.types.is_fixed_size_binary(field.type):
        kind = pa.binary(shape[0] * slice_bytes(shape[1:], field_dtype(field)))
    else:
        kind = field.type
    changed = {b"shape": json.dumps(list(shape)).encode()}
    return field.with_type(kind).with_metadata({**field.metadata, **changed})


def text_fields(name: str, shape: Sequence[int], dtype: PackedDtype) -> tuple[pa.Field, pa.Field]:
    """Describe an encoded text: its row in the data file, its tokens in the texts file.

    Args:
        name: of the column.
        shape: of the longest text: (max_tokens, width).
        dtype: element type.
    """
    return (
        pa.field(row_column(name), pa.int32(), nullable=False),
        pa.field(name, pa.large_binary(), nullable=False, metadata=_metadata(shape, dtype)),
    )


def row_column(name: str) -> str:
    """Name the column of a data file that says where an encoded text is."""
    return f"{name}_row"


def texts_schema(fields: Sequence[pa.Field]) -> pa.Schema:
    """Describe a texts file; a text that a column does not encode has no bytes there."""
    return pa.schema([pa.field("raw_text", pa.string(), nullable=False), *fields])


def field_shape(field: pa.Field) -> tuple[int, ...]:
    """Read the shape of one row of a column; () for a plain value."""
    return tuple(json.loads((field.metadata or {}).get(b"shape", b"[]")))


def field_dtype(field: pa.Field) -> PackedDtype:
    """Read the element type of a column of packed tensors."""
    name = field.metadata[b"dtype"].decode()
    return next(dtype for dtype in PACKED_DTYPES if dtype == name)


def column_values(column: pa.ChunkedArray | pa.Array, field: pa.Field) -> np.ndarray | list[str]:
    """Turn a column into what training uses.

    Tensors become (rows, *shape) without a copy where the column is one chunk, so maybe read-only;
    packed ones are unpacked. Pictures are decoded to uint8 (rows, height, width, 3); numbers become
    an array of their type, strings a list.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_fixed_size_list(field.type):
        values = column.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(column), *field_shape(field))
    if pa.types.is_fixed_size_binary(field.type):
        return _unpack_tensors(column, field)
    if pa.types.is_binary(field.type):
        pictures = [decode_png(picture) for picture in column.to_pylist()]
        return np.stack(pictures) if pictures else np.empty((0, *field_shape(field)), np.uint8)
    if pa.types.is_string(field.type):
        return column.to_pylist()
    return column.to_numpy(zero_copy_only=False)


def _unpack_tensors(column: pa.FixedSizeBinaryArray, field: pa.Field) -> np.ndarray:
    shape, width = field_shape(field), field.type.byte_width
    buffer = np.frombuffer(column.buffers()[1], np.uint8)
    stored = buffer[column.offset * width : (column.offset + len(column)) * width]
    slices = unpack(stored.reshape(len(column) * shape[0], -1), shape[1:], field_dtype(field))
    return slices.reshape(len(column), *shape)


class Texts(NamedTuple):
    """Encoded texts of one batch."""

    tokens: np.ndarray
    """float (rows, max_tokens, width), zero behind the end of each text."""
    lengths: np.ndarray
    """int64 (rows,): real tokens of each text."""


def padded_texts(column: pa.LargeBinaryArray, field: pa.Field) -> Texts:
    """Pad encoded texts with zeros to the longest that their column allows."""
    (max_tokens, width), dtype = field_shape(field), field_dtype(field)
    size = slice_bytes((width,), dtype)
    offsets = np.frombuffer(column.buffers()[1], np.int64)
    offsets = offsets[column.offset : column.offset + len(column) + 1]
    lengths = np.diff(offsets) // size
    data = column.buffers()[2]
    stored = np.frombuffer(b"" if data is None else data, np.uint8)[offsets[0] : offsets[-1]]
    tokens = unpack(stored.reshape(-1, size), (width,), dtype)
    padded = np.zeros((len(column), max_tokens, width), tokens.dtype)
    padded[np.arange(max_tokens) < lengths[:, None]] = tokens
    return Texts(padded, lengths)


def decode_png(data: bytes) -> np.ndarray:
    """Decode a cached picture to uint8 (height, width, 3)."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.array(image)


def _metadata(shape: Sequence[int], dtype: Dtype | None = None) -> dict[str, str]:
    named = {"dtype": dtype} if dtype in PACKED_DTYPES else {}
    return {"shape": json.dumps(list(shape)), **named}
