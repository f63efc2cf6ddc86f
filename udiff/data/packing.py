"""Tensors as bytes, for element types that parquet has no compact column for.

A tensor is its slices along the first axis, end to end: tokens of a text, channels of a latent. So
a text can have any number of tokens, and an int8 slice a scale of its own.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, UInt8

PackedDtype = Literal["float16", "bfloat16", "int8"]
"""`float16` and `bfloat16` as they are, little-endian; `int8`: the slice's scale, a float32, then
rint(value / scale), where scale is the slice's largest magnitude over 127."""

PACKED_DTYPES: tuple[PackedDtype, ...] = get_args(PackedDtype)
_SCALE_BYTES = 4


def slice_bytes(shape: Sequence[int], dtype: PackedDtype) -> int:
    """Count the bytes of a slice of a shape."""
    count = math.prod(shape)
    return count + _SCALE_BYTES if dtype == "int8" else 2 * count


def pack(
    values: Float[np.ndarray, "slices *shape"], dtype: PackedDtype
) -> UInt8[np.ndarray, "slices bytes"]:
    """Store finite slices; `unpack` gives float16 back exactly, others as nearly as they can."""
    flat = np.ascontiguousarray(values.reshape(len(values), math.prod(values.shape[1:])))
    if dtype == "float16":
        return flat.astype(np.float16, copy=False).view(np.uint8)
    flat = flat.astype(np.float32, copy=False)
    if dtype == "bfloat16":
        return _round_to_bfloat16(flat).view(np.uint8)
    # The smallest normal number keeps the scale of an all-zero slice from dividing by zero.
    scale = np.maximum(np.abs(flat).max(1, keepdims=True) / 127, np.finfo(np.float32).tiny)
    codes = np.rint(flat / scale).clip(-127, 127).astype(np.int8)
    return np.concatenate([scale.astype(np.float32).view(np.uint8), codes.view(np.uint8)], 1)


def unpack(
    packed: UInt8[np.ndarray, "slices bytes"], shape: Sequence[int], dtype: PackedDtype
) -> Float[np.ndarray, "slices *shape"]:
    """Read slices of a shape: float16 of float16, float32 of the others."""
    packed = np.ascontiguousarray(packed)
    if dtype == "float16":
        flat = packed.view(np.float16)
    elif dtype == "bfloat16":
        flat = (packed.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        scale = np.ascontiguousarray(packed[:, :_SCALE_BYTES]).view(np.float32)
        flat = packed[:, _SCALE_BYTES:].view(np.int8) * scale
    return flat.reshape(len(packed), *shape)


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, as torch does."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
