import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from udiff.data.packing import pack, unpack

_FLOATS = st.floats(-65504, 65504, width=32)
_VALUES = arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 5)), elements=_FLOATS)


@given(_VALUES)
def test_bfloat16_is_torchs(values):
    found = unpack(pack(values, "bfloat16"), values.shape[1:], "bfloat16")
    np.testing.assert_array_equal(found, torch.from_numpy(values).bfloat16().float().numpy())


@given(_VALUES)
def test_float16_is_kept_exactly(values):
    half = values.astype(np.float16)
    np.testing.assert_array_equal(unpack(pack(half, "float16"), half.shape[1:], "float16"), half)


@given(_VALUES)
def test_int8_errs_by_half_a_step_of_its_slice_at_most(values):
    found = unpack(pack(values, "int8"), values.shape[1:], "int8")
    step = np.abs(values).max(1, keepdims=True, initial=0) / 127
    assert (np.abs(found - values) <= step * 0.5001 + 1e-37).all()
