import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import TarWriter

from pipelines.shards import fingerprint, list_shards, read_index
from pipelines.stages.read_shard import read_slice
from pipelines.tar import samples, walk
from udiff.data.storage import open_folder

_FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
_KEYS = st.text(st.sampled_from("ab0é_- /"), min_size=1, max_size=6).filter(
    lambda key: not key.startswith("/") and not key.endswith("/") and "//" not in key
)


def _tar(files, kind):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _shard(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "00000.tar").write_bytes(content)
    (folder / "00000_stats.json").write_text("{}")
    return open_folder(folder)


def _index(tmp_path, source):
    return read_index(
        source, open_folder(tmp_path / "out"), "00000.tar", fingerprint(source, "00000.tar")
    )


@given(
    st.lists(st.tuples(_KEYS, st.binary(max_size=1100)), max_size=8, unique_by=lambda x: x[0]),
    st.sampled_from(_FORMATS),
)
@settings(deadline=None)
def test_members_are_those_that_tarfile_finds(files, kind):
    files = [(f"{key}.png", content) for key, content in files]
    content = _tar(files, kind)
    found = list(walk(io.BytesIO(content)))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert [(m.name, m.start, m.data, m.size) for m in found] == [
            (info.name, info.offset, info.offset_data, info.size) for info in tar
        ]
    assert [content[m.data : m.data + m.size] for m in found] == [each for _, each in files]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("unit_rows", [1, 2, 3, 10])
def test_slices_hold_every_sample_once_with_its_long_name(tmp_path, kind, unit_rows):
    keys = [f"{'folder' * 20}/{'long' * 30}{number}" for number in range(5)]
    files = [(f"{key}.{ext}", f"{key}{ext}".encode()) for key in keys for ext in ("png", "txt")]
    source = _shard(tmp_path / "in", _tar(files, kind))
    units = _index(tmp_path, source).units(unit_rows)
    rows = [row for unit in units for row in read_slice(source, unit)]
    assert [row["key"] for row in rows] == keys
    assert all(row["members"]["txt"] == f"{row['key']}txt".encode() for row in rows)
    assert sum(unit.num_samples for unit in units) == len(keys)


def test_shards_of_webdatasets_own_writer_are_read(tmp_path):
    (tmp_path / "in").mkdir()
    with TarWriter(str(tmp_path / "in" / "00000.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"{'k' * 120}{number}", "txt": "caption", "png": b"data"})
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    source = open_folder(tmp_path / "in")
    units = _index(tmp_path, source).units(2)
    rows = [row for unit in units for row in read_slice(source, unit)]
    assert [row["key"][-1] for row in rows] == ["0", "1", "2"]
    assert rows[0]["members"] == {"txt": b"caption", "png": b"data"}


def test_keys_go_to_the_first_dot_and_a_repeated_extension_is_another_sample():
    names = ["a/x.seg.png", "a/x.txt", "a/x.txt", "README", "y.v1.png"]
    content = _tar([(name, b"") for name in names], tarfile.USTAR_FORMAT)
    found = [(s.key, tuple(s.members)) for s in samples(walk(io.BytesIO(content)))]
    assert found == [("a/x", ("seg.png", "txt")), ("a/x", ("txt",)), ("y", ("v1.png",))]


@pytest.mark.parametrize("damage", ["cut inside", "cut between", "flipped header"])
def test_a_damaged_shard_is_named_and_its_place_too(tmp_path, damage):
    content = bytearray(_tar([(f"{n}.png", bytes(700)) for n in range(4)], tarfile.USTAR_FORMAT))
    if damage == "flipped header":
        content[1536 + 10] ^= 1
    else:
        del content[1536 * 2 + (600 if damage == "cut inside" else 0) :]
    source = _shard(tmp_path / "in", bytes(content))
    with pytest.raises(ValueError, match=r"00000\.tar: (cut off|damaged header) at byte \d+"):
        _index(tmp_path, source)


def test_the_index_is_kept_until_the_shard_changes(tmp_path):
    source = _shard(tmp_path / "in", _tar([("a.png", b"1")], tarfile.USTAR_FORMAT))
    first = _index(tmp_path, source)
    kept = (tmp_path / "out" / "index" / "00000.json").stat()
    assert _index(tmp_path, source) == first
    assert (tmp_path / "out" / "index" / "00000.json").stat().st_ino == kept.st_ino
    _shard(tmp_path / "in", _tar([("a.png", b"1"), ("b.png", b"2")], tarfile.USTAR_FORMAT))
    assert len(_index(tmp_path, source).starts) == 2


def test_incomplete_and_missing_shards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no input folder"):
        list_shards(open_folder(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no shards"):
        list_shards(open_folder(tmp_path))
    (tmp_path / "00007.tar").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"00007\.tar is not complete: 00007_stats\.json"):
        list_shards(open_folder(tmp_path))
