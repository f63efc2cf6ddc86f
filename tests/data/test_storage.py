import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from udiff.data.storage import Folder, open_folder


def test_a_written_file_is_read_back_and_listed(tmp_path):
    folder = open_folder(tmp_path / "new" / "cache")
    folder.write("b.json", b"2")
    folder.write("a.json", b"1")
    assert folder.names() == ("a.json", "b.json")
    assert folder.read("a.json") == b"1"
    assert folder.exists()
    assert folder.exists("b.json")
    assert not folder.exists("c.json")


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    folder = open_folder(tmp_path)
    folder.write("a", b"old")

    def full_disk(_descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        folder.write("a", b"new")
    assert folder.read("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_temporary_files_are_not_listed_and_can_be_removed(tmp_path):
    folder = open_folder(tmp_path)
    folder.write("a", b"1")
    (tmp_path / ".a.0123.tmp").write_bytes(b"half")
    assert folder.names() == ("a",)
    folder.remove_temporaries()
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_that_another_job_swept_away_is_written_again(tmp_path, monkeypatch):
    folder, sync, swept = open_folder(tmp_path), os.fsync, []

    def sync_and_sweep(descriptor):
        sync(descriptor)
        if not swept:
            swept.append(True)
            folder.remove_temporaries()

    monkeypatch.setattr(os, "fsync", sync_and_sweep)
    folder.write("a", b"content")
    assert folder.read("a") == b"content"
    assert os.listdir(tmp_path) == ["a"]


def test_a_bucket_gets_each_file_in_one_piece():
    filesystem = fs._MockFileSystem()
    filesystem.create_dir("bucket/cache")
    folder = Folder(filesystem, "bucket/cache")
    (folder).write("a", b"content")
    assert folder.read("a") == b"content"
    assert folder.names() == ("a",)


def test_in_a_bucket_the_last_writer_wins_whole():
    filesystem = fs._MockFileSystem()
    filesystem.create_dir("bucket/shards")
    folder, names = Folder(filesystem, "bucket/shards"), ("a.tar", "a.parquet", "a.json")

    class Slow(dict):
        """Files of which the first takes so long that another writer is done meanwhile."""

        def items(self):
            assert folder.publish(dict.fromkeys(names, b"quick"))
            return super().items()

    assert folder.publish(Slow.fromkeys(names, b"slow"))
    assert {folder.read(name) for name in names} == {b"slow"}
    assert not folder.publish(dict.fromkeys(names, b"late"))
    assert {folder.read(name) for name in names} == {b"slow"}


@given(st.sampled_from(["endpoint_override=127.0.0.1%3A9000&scheme=http", "region=eu-north-1"]))
def test_a_folders_name_opens_the_same_folder(options):
    location = f"s3://bucket/some/cache?{options}"
    folder = open_folder(location) / "data"
    again = open_folder(str(folder))
    assert again.path == "bucket/some/cache/data"
    assert again.filesystem == folder.filesystem


def test_local_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(open_folder("cache")) == str(tmp_path / "cache")
