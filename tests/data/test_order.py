import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from udiff.data.order import SampleOrder

orders = st.builds(
    SampleOrder,
    st.lists(st.integers(1, 60), min_size=1, max_size=12).map(tuple),
    seed=st.integers(0, 2**32),
    window_row_groups=st.integers(1, 5),
    lanes=st.integers(1, 9),
)


def rows_of(order: SampleOrder, positions: np.ndarray) -> list[tuple[int, int]]:
    """Epoch and row of the cache at each position."""
    starts = np.concatenate([[0], np.cumsum(order._sizes)])
    found = []
    for epoch, window, index in zip(*order.places(positions), strict=True):
        groups = order.window_row_groups(epoch, window)
        rows = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in groups])
        found.append((int(epoch), int(rows[order.window_permutation(epoch, window)[index]])))
    return found


@given(orders, st.integers(0, 3))
def test_every_row_comes_once_an_epoch(order, epoch):
    positions = np.arange(order.num_rows) + epoch * order.num_rows
    assert sorted(rows_of(order, positions)) == [(epoch, row) for row in range(order.num_rows)]


@given(orders, st.integers(0, 500), st.integers(1, 40))
def test_any_position_is_found_without_those_before_it(order, start, count):
    positions = np.arange(start + count)
    assert rows_of(order, positions)[start:] == rows_of(order, positions[start:])


def test_epochs_and_seeds_differ_in_order():
    sizes = (64,) * 8
    first, second = (SampleOrder(sizes, seed=seed, window_row_groups=2, lanes=4) for seed in (0, 1))
    epoch = np.arange(512)
    rows = [row for _, row in rows_of(first, epoch)]
    assert rows != [row for _, row in rows_of(first, epoch + 512)]
    assert rows != [row for _, row in rows_of(second, epoch)]


def test_a_batch_mixes_distant_rows():
    order = SampleOrder((64,) * 32, seed=0, window_row_groups=2, lanes=8)
    _, windows, _ = order.places(np.arange(64))
    assert len(set(windows.tolist())) == 8
