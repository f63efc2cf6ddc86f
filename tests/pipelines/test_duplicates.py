"""Which rows are duplicates: laws of the decision, against comparing all with all."""

import io
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.fetch_testdata import fetch_photographs
from pipelines.duplicates import Cosine, Equality, Files, Hamming, drop_lists, find_pairs, resolve
from pipelines.stages.sign import sign_content, sign_perceptually
from pipelines.stages.write import encode_png
from udiff.data.storage import open_folder


def _write(folder, identities, pixels, comparable, sizes):
    """Write signatures as files of so many rows; a row's key is its place."""
    (folder / "data").mkdir(exist_ok=True)
    starts = np.cumsum([0, *sizes])
    for number, (start, stop) in enumerate(pairwise(starts.tolist())):
        table = pa.table(
            {
                "row": np.arange(stop - start, dtype=np.int32),
                "key": [str(n) for n in range(start, stop)],
                "pixels": np.array(pixels[start:stop], np.int64),
                "identity": np.array(identities[start:stop], np.int64),
                "comparable": np.array(comparable[start:stop], bool),
            }
        )
        pq.write_table(table, folder / "data" / f"{number}.parquet")
    paths = tuple(f"data/{number}.parquet" for number in range(len(sizes)))
    return Files(open_folder(folder), paths, tuple(starts.tolist()))


def _decide(files, rule, num_parts, order=1):
    num_rows = files.starts[-1]
    found = [
        find_pairs(files, rule, table, part, num_parts)
        for table in range(rule.tables(num_rows))
        for part in range(num_parts)
    ]
    return resolve(found[::order])


def _by_comparing_all(identities, pixels, comparable, distance):
    """Go from the best row to the worst; drop what is like a kept one."""
    rank = sorted(range(len(pixels)), key=lambda n: (-pixels[n], n))
    kept, dropped = [], {}
    for row in rank:
        for other in kept:
            differing = (identities[row] ^ identities[other]) & (2**64 - 1)
            near = comparable[row] and comparable[other] and differing.bit_count() <= distance
            if near or (comparable[row] == comparable[other] and not differing):
                dropped[row] = other
                break
        else:
            kept.append(row)
    return dropped


@st.composite
def _signatures(draw):
    bases = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
    count = draw(st.integers(1, 30))
    flips = st.lists(st.integers(0, 62), max_size=6)
    identities = []
    for _ in range(count):
        value = draw(st.sampled_from(bases))
        for bit in draw(flips):
            value ^= 1 << bit
        identities.append(value)
    pixels = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    comparable = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return identities, pixels, comparable


@settings(max_examples=25, deadline=None)
@given(_signatures(), st.integers(0, 9), st.integers(1, 5), st.integers(1, 4))
def test_bands_and_parts_find_what_comparing_all_finds(
    tmp_path_factory, signatures, distance, file_rows, num_parts
):
    count = len(signatures[0])
    sizes = [min(file_rows, count - start) for start in range(0, count, file_rows)]
    files = _write(tmp_path_factory.mktemp("s"), *signatures, sizes)
    dropped, kept = _decide(files, Hamming(distance), num_parts)
    wanted = _by_comparing_all(*signatures, distance)
    assert set(dropped.tolist()) == set(wanted)
    for found in (_decide(files, Hamming(distance), 1), _decide(files, Hamming(distance), 3, -1)):
        np.testing.assert_array_equal(found, (dropped, kept))
    assert not set(kept.tolist()) & set(dropped.tolist())
    _, pixels, _ = signatures
    assert all(pixels[k] >= pixels[d] for k, d in zip(kept, dropped, strict=True))


def test_what_is_dropped_is_like_the_very_row_that_is_kept(tmp_path):
    chain = [0, 0b11, 0b1111, 0b111111]  # each two bits from the next
    files = _write(tmp_path, chain, [9, 8, 7, 6], [True] * 4, [2, 2])
    dropped, kept = _decide(files, Hamming(2), 2)
    assert dict(zip(dropped.tolist(), kept.tolist(), strict=True)) == {1: 0, 3: 2}
    lists = {path: table.to_pydict() for path, table in drop_lists(files, dropped, kept)}
    assert lists == {
        "data/0.parquet": {"row": [1], "kept": ["0"]},
        "data/1.parquet": {"row": [1], "kept": ["2"]},
    }


def test_a_thousand_copies_take_a_thousand_pairs(tmp_path):
    files = _write(tmp_path, [7] * 1000, list(range(1000)), [True] * 1000, [400, 600])
    found = [find_pairs(files, Hamming(4), table, 0, 1) for table in range(5)]
    assert sum(len(pairs.equal) for pairs in found) == 999
    assert sum(len(pairs.near) for pairs in found) == 0
    dropped, kept = resolve(found)
    assert dropped.tolist() == list(range(999))
    assert set(kept.tolist()) == {999}


def test_equality_drops_the_equal_alone(tmp_path):
    files = _write(tmp_path, [5, 6, 5, 7], [1, 1, 1, 1], [False] * 4, [4])
    dropped, kept = _decide(files, Equality(), 2)
    assert (dropped.tolist(), kept.tolist()) == ([2], [0])


@pytest.mark.parametrize("num_rows", [600, 6000])
def test_embeddings_that_point_the_same_way_are_found(tmp_path, num_rows):
    draw = np.random.default_rng(0)
    base = draw.standard_normal((num_rows // 2, 32))
    vectors = np.concatenate([base, base + 0.05 * draw.standard_normal(base.shape)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), 32)
    files = _write(tmp_path, list(range(num_rows)), [1] * num_rows, [True] * num_rows, [num_rows])
    path = tmp_path / "data" / "0.parquet"
    pq.write_table(pq.read_table(path).append_column("embedding", embedding), path)
    dropped, kept = _decide(files, Cosine(0.95), 2)
    assert set((dropped - kept).tolist()) == {num_rows // 2}
    assert len(dropped) >= 0.99 * num_rows / 2


# ---------------------------------------------------------------- signatures


def _row(picture, quality=None):
    if quality is not None:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        picture = Image.open(file)
    size = {"width": picture.width, "height": picture.height}
    return encode_png({"key": "a", "source": "s", "number": 0, **size, "picture": picture})


def _distance(one, other):
    return ((one["identity"] ^ other["identity"]) & (2**64 - 1)).bit_count()


def test_copies_of_photographs_are_near_and_others_far():
    files = sorted(fetch_photographs().glob("*.jpg")) + sorted(fetch_photographs().glob("*.png"))
    pictures = [Image.open(file).convert("RGB").resize((256, 256)) for file in files]
    signed = [sign_perceptually(_row(picture)) for picture in pictures]
    copies = [
        sign_perceptually(_row(picture.resize((150, 150), Image.Resampling.LANCZOS), quality=70))
        for picture in pictures
    ]
    near = [_distance(*pair) for pair in zip(signed, copies, strict=True)]
    far = [_distance(a, b) for n, a in enumerate(signed) for b in signed[n + 1 :]]
    assert len(files) >= 15
    assert np.mean(np.array(near) <= 4) > 0.9
    assert np.mean(np.array(far) <= 4) < 0.02


def test_flat_pictures_are_compared_by_content():
    white, gray = (Image.new("RGB", (64, 64), color) for color in ("white", "gray"))
    signed = [sign_perceptually(_row(picture)) for picture in (white, gray, white)]
    assert [row["comparable"] for row in signed] == [False] * 3
    assert signed[0] == signed[2] == sign_content(_row(white))
    assert signed[0]["identity"] != signed[1]["identity"]
