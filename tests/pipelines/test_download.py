"""The chain from URLs to shards, called as an actor calls it but without Ray."""

import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.download import DownloadChain, DownloadSettings, _cut, _units, plan_download
from pipelines.pictures import PicturesChain, PicturesSettings, plan_pictures
from pipelines.source import open_source
from pipelines.stages.fetch import FetchSettings
from pipelines.stages.write import WriteUnit
from pipelines.stages.write_shard import WriteShard
from pipelines.url_list import list_files
from tests.faulty_server import GOOD, PASSING, PERMANENT, draw_jpeg, faulty_server
from udiff.data.manifest import INDEX, finish, read_manifest
from udiff.data.schema import pictures_schema
from udiff.data.storage import open_folder

FAULTS = [*GOOD, *PASSING, *PERMANENT, "truncated"]
NUM_GOOD = len(GOOD) + len(PASSING) + 1


def _write_list(path, urls):
    captions = [None if n % 7 == 3 else f"picture {n}" for n in range(len(urls))]
    table = pa.table(
        {"URL": urls, "TEXT": captions, "similarity": [n / 100 for n in range(len(urls))]}
    )
    pq.write_table(table, path, row_group_size=5)


def _settings(tmp_path, output="out", **changes):
    fetch = {
        "timeout_s": 1.0,
        "retries": 1,
        "pause_s": 0.01,
        "max_bytes": 1 << 20,
        "allowed_networks": ("127.0.0.1/32",),
        **changes,
    }
    return DownloadSettings(
        input=str(tmp_path / "urls.parquet"),
        output=str(tmp_path / output),
        shard_rows=20,
        fetch=FetchSettings(**fetch),
    )


def _download(settings):
    plan = plan_download(settings)
    folder, files = list_files(settings.input)
    output = open_folder(settings.output)
    cuts = {name: _cut(folder, output, name, mark, settings) for name, mark in files.items()}
    chain = DownloadChain(
        settings, output / INDEX, WriteShard(output, plan=plan.fingerprint, key_digits=2)
    )
    units = _units(cuts)
    for unit in units:
        chain(unit)
    return finish(output, plan, [unit.name for unit in units])


def _files(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".lock")
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("download")
    with faulty_server() as url:
        _write_list(tmp_path / "urls.parquet", [f"{url}/{f}/{n}" for n, f in enumerate(FAULTS)])
        _download(_settings(tmp_path))
    return tmp_path / "out"


def test_urls_are_downloaded_or_failed_with_their_reason(shards):
    manifest = read_manifest(shards)
    assert manifest.images_in == len(FAULTS)
    assert manifest.num_rows == NUM_GOOD
    assert sum(manifest.rejected.values()) == len(PERMANENT)
    assert set(manifest.rejected) == set(PERMANENT.values())
    rejected = pq.read_table(shards / "rejected").to_pylist()
    found = {row["source"].split("/")[3]: f"{row['stage']}/{row['reason']}" for row in rejected}
    assert found == PERMANENT


def test_the_layout_is_img2datasets(shards):
    table = pa.concat_tables(pq.read_table(file) for file in sorted(shards.glob("*.parquet")))
    rows = table.to_pylist()
    assert [row["key"] for row in rows[:2] + rows[20:22]] == [
        *("0000000", "0000001"),
        *("0000100", "0000101"),
    ]
    assert [row["similarity"] for row in rows] == [n / 100 for n in range(len(FAULTS))]
    good = [row for row in rows if row["status"] == "success"]
    assert {row["error_message"] for row in good} == {None}
    assert {row["width"] for row in good} == {64}
    failed = [row for row in rows if row["status"] == "failed_to_download"]
    assert len(good) + len(failed) == len(FAULTS)
    assert all(row["error_message"].startswith("download/") for row in failed)
    for file in sorted(shards.glob("*_stats.json")):
        stats = json.loads(file.read_text())
        assert stats["count"] == stats["successes"] + stats["failed_to_download"]
        assert sum(stats["status_dict"].values()) == stats["count"]


def test_tars_hold_the_pictures_as_they_came_in_the_order_of_the_list(shards):
    found = {}
    for file in sorted(shards.glob("*.tar")):
        with tarfile.open(file) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    pictures = [name for name in found if name.endswith(".jpg")]
    assert pictures == sorted(pictures)
    assert len(pictures) == NUM_GOOD
    for name in pictures[:-1]:
        number = int(name[:5]) * 20 + int(name[5:7])
        assert found[name] == draw_jpeg(number % 32)
        caption = "" if number % 7 == 3 else f"picture {number}"
        assert found[name.replace("jpg", "txt")].decode() == caption
        described = json.loads(found[name.replace("jpg", "json")])
        assert (described["key"], described["status"]) == (name[:7], "success")


def test_equal_answers_give_equal_bytes_in_whatever_order_they_come(shards, tmp_path):
    (tmp_path / "urls.parquet").write_bytes((shards.parent / "urls.parquet").read_bytes())
    with faulty_server(urlsplit(pq.read_table(tmp_path / "urls.parquet")["URL"][0].as_py()).port):
        _download(_settings(tmp_path, connections=3))
    assert _files(tmp_path / "out") == _files(shards)


def test_prepare_takes_the_shards_as_they_are(shards, tmp_path):
    settings = PicturesSettings(input=str(shards), output=str(tmp_path), size=32)
    plan, source, output = plan_pictures(settings), open_source(str(shards)), open_folder(tmp_path)
    write = WriteUnit(
        output, schema=pictures_schema((32, 32)), plan=plan.fingerprint, row_group_size=256
    )
    chain = PicturesChain(settings, source, write, made_by=None)
    cuts = [source.cut(output, *shard, 1000) for shard in plan.inputs.items()]
    for units in cuts:
        chain(*units)
    manifest = finish(output, plan, [unit.name for units in cuts for unit in units])
    without_caption = sum(n % 7 == 3 for n in range(NUM_GOOD - 1))
    assert manifest.images_in == NUM_GOOD
    assert manifest.rejected == {
        "decode/truncated": 1,
        "read/missing_caption": without_caption,
    }


def test_another_policy_at_the_same_place_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match=r"identity.shards.opt_outs is .* wanted \[\]"):
        plan_download(_settings(shards.parent, opt_outs=()))
    plan_download(_settings(shards.parent, timeout_s=30, retries=5))


def test_the_first_of_several_writers_wins_whole(tmp_path):
    folder = open_folder(tmp_path)

    def publish(writer):
        content = f"{writer}".encode()
        names = ("a.tar", "a.parquet", "units/a.json")
        return folder.publish(dict.fromkeys(names, content))

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(publish, range(40)))
    assert won.count(True) == 1
    written = {file.read_text() for file in tmp_path.rglob("a.*")}
    assert written == {str(won.index(True))}
    assert not list(tmp_path.rglob(".a.*"))


def test_a_download_of_nothing_says_why(tmp_path):
    _write_list(tmp_path / "urls.parquet", ["http://127.0.0.1/a.jpg", "no url"])
    with pytest.raises(ValueError, match="'download/address': 1, 'download/bad_url': 1"):
        _download(_settings(tmp_path, allowed_networks=()))


def test_networks_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"10\.0\.0\.1/8 has host bits set"):
        FetchSettings(allowed_networks=("10.0.0.1/8",))
