import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from udiff.data.order import BatchPlan, SampleOrder

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


plans = st.tuples(
    st.lists(st.integers(1, 70), min_size=1, max_size=5), st.integers(1, 20), st.integers(0, 2**32)
)


@given(plans, st.integers(1, 4))
def test_each_bucket_is_passed_through_in_order_batch_after_batch(plan, epochs):
    num_rows, batch_size, seed = plan
    batches = BatchPlan(num_rows, batch_size=batch_size, seed=seed)
    next_start = [0] * len(num_rows)
    for step in range(epochs * sum(-(-rows // batch_size) for rows in num_rows)):
        bucket, start = batches.batch(step)
        assert start == next_start[bucket]
        next_start[bucket] += batch_size


@given(plans, st.integers(0, 4))
def test_after_an_epoch_every_row_of_every_bucket_has_been_used(plan, epoch):
    num_rows, batch_size, seed = plan
    batches = BatchPlan(num_rows, batch_size=batch_size, seed=seed)
    used, step = [0] * len(num_rows), 0
    while batches.epoch(step) <= epoch:
        used[batches.batch(step).bucket] += batch_size
        step += 1
    for rows, count in zip(num_rows, used, strict=True):
        assert (epoch + 1) * rows <= count < (epoch + 1) * rows + batch_size


@given(plans, st.integers(0, 300))
def test_a_step_is_found_without_those_before_it(plan, step):
    num_rows, batch_size, seed = plan
    fresh, used = (BatchPlan(num_rows, batch_size=batch_size, seed=seed) for _ in range(2))
    replayed = [used.batch(each) for each in range(step + 1)]
    assert fresh.batch(step) == replayed[step]


def test_buckets_come_in_another_order_every_epoch():
    plan = BatchPlan([64] * 4, batch_size=8, seed=0)
    buckets = [plan.batch(step).bucket for step in range(64)]
    assert sorted(buckets[:32]) == sorted(buckets[32:]) == [k for k in range(4) for _ in range(8)]
    assert buckets[:32] != buckets[32:]
    assert buckets[:32] != sorted(buckets[:32])
