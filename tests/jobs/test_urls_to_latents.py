"""The README's commands one after another: URLs to latents, on disk and in a bucket."""

from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import download, inspect, prepare
from jobs.cluster import connect
from tests.captioner import save_captioner
from tests.faulty_server import GOOD, PASSING, PERMANENT, faulty_server
from tests.made import save_autoencoder
from udiff.data.manifest import read_manifest
from udiff.data.storage import open_folder

FAULTS = (*GOOD, *PASSING, *GOOD, *PERMANENT, "truncated")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_captioner(folder / "captioner")
    save_autoencoder(folder / "vae")
    return folder


def _write_list(path, url):
    urls = [f"{url}/{fault}/{n}" for n, fault in enumerate(FAULTS)]
    pq.write_table(
        pa.table({"URL": urls, "TEXT": [f"picture {n}" for n in range(len(urls))]}), path
    )


def _fetching(tmp_path, shards):
    limits = ("--timeout-s", "1", "--retries", "1", "--pause-s", "0.01", "--max-bytes", "1000000")
    allowed = ("--allowed-networks", "127.0.0.1/32", "--shard-rows", "12")
    return ["--input", str(tmp_path / "urls.parquet"), "--output", shards, *limits, *allowed]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_list_of_urls_becomes_latents(where, models, tmp_path, request, capsys):
    connect()
    root = str(tmp_path) if where == "disk" else request.getfixturevalue("bucket")
    path, _, query = root.partition("?")

    def folder(name):
        return f"{path}/{name}{query and '?'}{query}"

    with faulty_server() as url:
        _write_list(tmp_path / "urls.parquet", url)
        assert download.main(_fetching(tmp_path, folder("shards"))) == 0
    steps = (
        ("pictures", "shards", ["--size", "32", "--unit-rows", "4"]),
        ("dedup", "pictures", []),
        ("recaption", "dedup", ["--model", str(models / "captioner")]),
        ("latents", "recaption", ["--autoencoder", str(models / "vae")]),
    )
    manifests = [read_manifest(open_folder(folder("shards")))]
    for name, source, options in steps:
        given = ["--input", folder(source), "--output", folder(name), *options]
        assert prepare.main([name, *given]) == 0, capsys.readouterr().err
        manifests.append(read_manifest(open_folder(folder(name))))
    assert manifests[0].images_in == len(FAULTS)
    for before, after in pairwise(manifests):
        assert after.images_in == before.num_rows
    for manifest in manifests:
        assert manifest.images_in == manifest.num_rows + sum(manifest.rejected.values())
    assert manifests[1].rejected == {"decode/truncated": 1}
    assert inspect.main(["--input", folder("latents"), "--page", str(tmp_path / "look.html")]) == 0
    assert (tmp_path / "look.html").stat().st_size > 1000
