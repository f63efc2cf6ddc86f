"""Fetching from a real server that fails in every way."""

import hashlib
import io
import time

import pytest

from pipelines.addresses import Guard
from pipelines.rows import Reason, Refusal
from pipelines.stages.fetch import FetchSettings, fetch, opted_out
from pipelines.stages.write_shard import Pictures
from tests.faulty_server import GOOD, PASSING, PERMANENT, draw_jpeg, faulty_server

QUICK = FetchSettings(
    timeout_s=1.0,
    retries=1,
    pause_s=0.01,
    max_bytes=1 << 20,
    allowed_networks=("127.0.0.1/32",),
)


@pytest.fixture(scope="module")
def server():
    with faulty_server() as url:
        yield url


def _fetch(urls, hashes=None, **changes):
    pictures = Pictures(io.BytesIO(), hashes or [None] * len(urls))
    refusals = fetch(urls, pictures.take, QUICK.model_copy(update=changes))
    reasons = [None if refusal is None else str(refusal.reason) for refusal in refusals]
    assert [place in pictures.found for place in range(len(urls))] == [r is None for r in reasons]
    return reasons, pictures


def test_every_fault_ends_in_the_picture_or_in_its_reason(server):
    faults = [*GOOD, *PASSING, *PERMANENT]
    reasons, pictures = _fetch([f"{server}/{fault}/{n}" for n, fault in enumerate(faults)])
    assert dict(zip(faults, reasons, strict=True)) == {
        **dict.fromkeys((*GOOD, *PASSING)),
        **PERMANENT,
    }
    for place, picture in pictures.found.items():
        assert pictures.read(picture) == draw_jpeg(place)
        assert (picture.width, picture.height, picture.extension) == (64, 64, "jpg")
        assert picture.sha256 == hashlib.sha256(draw_jpeg(place)).hexdigest()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", Reason.BAD_URL),
        ("no scheme", Reason.BAD_URL),
        ("ftp://example.org/a.jpg", Reason.BAD_URL),
        ("file:///etc/passwd", Reason.BAD_URL),
        ("http://", Reason.BAD_URL),
        ("http://exa mple/", None),
        ("http://[::1", Reason.BAD_URL),
        ("http://a:99999999/", Reason.BAD_URL),
        ("http://127.0.0.2/a.jpg", Reason.ADDRESS),
        ("http://[::1]/a.jpg", Reason.ADDRESS),
        ("http://[::ffff:10.0.0.1]/a.jpg", Reason.ADDRESS),
        ("http://2130706434/a.jpg", Reason.BAD_URL),
        ("http://0x7f.0.0.2/a.jpg", Reason.ADDRESS),
        ("http://0/a.jpg", Reason.BAD_URL),
        ("http://127.0.0.1:1/nobody-listens", Reason.CONNECTION),
        ("http://no-such-name.invalid/a.jpg", Reason.NAME),
    ],
)
def test_urls_that_lead_nowhere(url, reason):
    reasons, _ = _fetch([url], timeout_s=10.0)
    assert reasons[0] is not None
    assert reason is None or reasons == [str(reason)]


def test_a_server_without_tls_is_named_so(server):
    reasons, _ = _fetch([server.replace("http:", "https:") + "/ok/1"], timeout_s=10.0)
    assert reasons == ["download/tls"]


def test_names_that_stand_for_private_addresses_are_refused(server):
    port = server.rpartition(":")[2]
    reasons, _ = _fetch([f"http://localhost:{port}/ok/1"], allowed_networks=())
    assert reasons == ["download/address"]
    reasons, _ = _fetch([f"http://localhost:{port}/ok/1"])
    assert reasons == [None]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0"),
        *("100.100.100.200", "255.255.255.255", "224.0.0.1", "::1", "::", "fe80::1%eth0"),
        *("fd00:ec2::254", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1"),
    ],
)
def test_addresses_that_are_not_public_are_refused_unless_allowed(address):
    assert not Guard().allows(address)
    assert Guard.allowing(["0.0.0.0/0", "::/0"]).allows(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_public_addresses_are_allowed(address):
    assert Guard().allows(address)


@pytest.mark.parametrize(
    ("value", "forbids"),
    [
        ("noai", True),
        ("all, NoImageAI", True),
        ("udiff: noindex", True),
        ("otherbot: noai", False),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST, noai", True),
        ("noarchive, max-snippet: 3", False),
        ("", False),
    ],
)
def test_directives_of_hosts_are_understood(value, forbids):
    assert opted_out([value], FetchSettings()) is forbids
    assert not opted_out([value], FetchSettings(opt_outs=()))


def test_a_hung_host_holds_nothing_beyond_the_deadline(server):
    started = time.monotonic()
    urls = [f"{server}/hang/{n}" for n in range(100)] + [f"{server}/ok/{n}" for n in range(20)]
    reasons, _ = _fetch(urls, deadline_s=1.5, timeout_s=60.0, connections=100)
    assert reasons.count("download/deadline") >= 100
    assert time.monotonic() - started < 1.5 + 10


def test_a_picture_that_is_not_the_listed_one_is_refused(server):
    hashes = [hashlib.sha256(draw_jpeg(1)).hexdigest(), 64 * "0", None]
    reasons, _ = _fetch([f"{server}/ok/{n}" for n in (1, 2, 3)], hashes)
    assert reasons == [None, "download/other_hash", None]


def test_an_error_that_is_no_rows_fault_is_not_swallowed(server):
    def take(place, body):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fetch([f"{server}/ok/1"], take, QUICK)


def test_what_takes_the_body_may_refuse_it(server):
    def take(place, body):
        raise Refusal(Reason.NO_PICTURE)

    refusals = fetch([f"{server}/ok/1"], take, QUICK)
    assert [refusal.reason for refusal in refusals] == [Reason.NO_PICTURE]


def test_no_urls_are_no_work():
    assert fetch([], None, QUICK) == []
