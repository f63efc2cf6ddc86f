"""Stage: URLs -> the bodies of their pictures, many at a time, within a deadline.

img2dataset's downloader does this in one function that bounds neither a row nor a shard in time (a
host that drips a byte a second holds it), takes any address and any size, asks again at once, and
writes in the order of arrival; so only its layout is kept.
"""

import asyncio
import errno
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from tempfile import SpooledTemporaryFile
from typing import Annotated

import aiohttp
from aiohttp import ClientResponse, ClientSession
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from pipelines.addresses import Guard
from pipelines.rows import Reason, Refusal
from udiff.settings import Settings

Body = SpooledTemporaryFile[bytes]
Take = Callable[[int, Body], None]
"""Takes the body of the row at a place, in the order of arrival; raises `Refusal` for a bad one."""

_IN_MEMORY_BYTES = 1 << 20  # of a body; what is larger goes through a file
_CHUNK_BYTES = 1 << 16
_MAX_REDIRECTS = 5
_MAX_PAUSE_S = 60.0
_TRANSIENT = (
    Reason.NAME,
    Reason.CONNECTION,
    Reason.TIMEOUT,
    Reason.CUT_OFF,
    Reason.BUSY,
    Reason.SERVER_ERROR,
)
_STATUSES = {404: Reason.NOT_FOUND, 410: Reason.NOT_FOUND, 408: Reason.TIMEOUT, 429: Reason.BUSY}
_STATUSES |= dict.fromkeys((401, 402, 403, 451), Reason.FORBIDDEN)
_VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


def _networks(names: tuple[str, ...]) -> tuple[str, ...]:
    Guard.allowing(names)
    return names


class DiskError(RuntimeError):
    """This machine cannot keep what it fetches: the fault of no row."""


class FetchSettings(Settings):
    """How pictures are asked for; never through a proxy, behind which no address can be checked."""

    timeout_s: PositiveFloat = 20.0
    """For one try of one picture, from its name's lookup to its last byte."""
    retries: int = Field(default=2, ge=0)
    """Tries after the first, of rows whose failure may pass."""
    pause_s: float = Field(default=1.0, ge=0)
    """Before the first retry; doubled for each further one, and longer where the host asks."""
    deadline_s: PositiveFloat = 1800.0
    """For a shard; rows that are not there by then have failed."""
    connections: PositiveInt = 256
    """At a time, of one worker."""
    connections_per_host: PositiveInt = 32
    max_bytes: PositiveInt = 64 << 20
    """Of one picture."""
    user_agent: str = "Mozilla/5.0 (compatible; udiff)"
    agent_name: str = "udiff"
    """Whose `X-Robots-Tag` directives count beside those for all."""
    opt_outs: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of `X-Robots-Tag` that forbid the use of a picture; () heeds none."""
    allowed_networks: Annotated[tuple[str, ...], AfterValidator(_networks)] = ()
    """Not public, but allowed: `10.0.0.0/8`."""


def fetch(urls: Sequence[str], take: Take, settings: FetchSettings) -> list[Refusal | None]:
    """Fetch pictures, and hand each body over as it arrives.

    Returns:
        Per URL, None or why there is no picture; no later than the deadline.
    """
    loop = asyncio.new_event_loop()
    # Looks names up, one a thread; the default has a few threads, for which hosts would queue.
    loop.set_default_executor(ThreadPoolExecutor(settings.connections, "names"))
    try:
        return loop.run_until_complete(_fetch_all(urls, take, settings))
    finally:
        loop.close()  # does not wait for lookups of names that hang


async def _fetch_all(
    urls: Sequence[str], take: Take, settings: FetchSettings
) -> list[Refusal | None]:
    connector = aiohttp.TCPConnector(
        limit=0,  # counted here: waiting for a connection must not use up a row's time
        ttl_dns_cache=300,
        socket_factory=Guard.allowing(settings.allowed_networks).open_socket,
    )
    session = ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.timeout_s),
        headers={"User-Agent": settings.user_agent, "Accept-Encoding": "identity"},
    )
    async with session:
        rows = _Rows(session, take, settings)
        tasks = [asyncio.create_task(rows.fetch(*row)) for row in enumerate(urls)]
        if not tasks:
            return []
        await asyncio.wait(tasks, timeout=settings.deadline_s, return_when=asyncio.FIRST_EXCEPTION)
        late = [task for task in tasks if not task.done()]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        too_late = Refusal(Reason.DEADLINE)
        return [too_late if task.cancelled() else task.result() for task in tasks]


class _Rows:
    """What the rows of a shard share."""

    def __init__(self, session: ClientSession, take: Take, settings: FetchSettings) -> None:
        self._session = session
        self._take = take
        self._settings = settings
        self._all = asyncio.Semaphore(settings.connections)
        self._hosts: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(settings.connections_per_host)
        )

    async def fetch(self, place: int, url: str) -> Refusal | None:
        """Try to get a picture, and again where that may help."""
        host = url.partition("://")[2].partition("/")[0]
        for attempt in range(self._settings.retries + 1):
            try:
                # First the host's turn, so that a slow host does not use up the turns of others.
                async with self._hosts[host], self._all:
                    await self._try(place, url)
                return None
            except Refusal as refusal:
                last = refusal
            if last.reason not in _TRANSIENT:
                break
            if attempt < self._settings.retries:
                asked = last.pause_s if isinstance(last, _StatusRefusal) else 0.0
                await asyncio.sleep(max(self._settings.pause_s * 2**attempt, asked))
        return last

    async def _try(self, place: int, url: str) -> None:
        with SpooledTemporaryFile(_IN_MEMORY_BYTES) as body:
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    await self._read(url, body)
            except (Refusal, DiskError, MemoryError):
                raise
            except Exception as error:
                raise _refusal(error) from error
            body.seek(0)
            self._take(place, body)

    async def _read(self, url: str, body: Body) -> None:
        async with self._session.get(url, max_redirects=_MAX_REDIRECTS) as response:
            _check_answer(response, self._settings)
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                _check_size(body.tell() + len(chunk), self._settings.max_bytes)
                _write(body, chunk)


def _write(body: Body, chunk: bytes) -> None:
    try:
        body.write(chunk)
    except OSError as error:
        raise DiskError(f"cannot write a temporary file: {error}") from error


class _StatusRefusal(Refusal):
    """A status other than 200, and how long the host asks to be left alone."""

    def __init__(self, response: ClientResponse) -> None:
        super().__init__(_status_reason(response.status), f"status {response.status}")
        seconds = response.headers.get("Retry-After", "")
        self.pause_s = min(float(seconds), _MAX_PAUSE_S) if seconds.isdecimal() else 0.0


def _check_answer(response: ClientResponse, settings: FetchSettings) -> None:
    if response.status != 200:
        raise _StatusRefusal(response)
    for hop in (*response.history, response):
        if opted_out(hop.headers.getall("X-Robots-Tag", ()), settings):
            raise Refusal(Reason.OPTED_OUT)
    _check_size(response.content_length or 0, settings.max_bytes)


def _check_size(num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise Refusal(Reason.TOO_MANY_BYTES, f"more than {limit} bytes")


def opted_out(values: Iterable[str], settings: FetchSettings) -> bool:
    """Tell whether values of `X-Robots-Tag` forbid the use of what comes with them.

    A value is `directive, directive ...`, for all or, after `agent:`, for one.
    """
    unwanted = {directive.lower() for directive in settings.opt_outs}
    for value in values:
        agent, colon, rest = value.lower().partition(":")
        is_named = colon and "," not in agent and agent.strip() not in _VALUED_DIRECTIVES
        if is_named and agent.strip() != settings.agent_name.lower():
            continue
        directives = (rest if is_named else value.lower()).split(",")
        if unwanted & {directive.strip() for directive in directives}:
            return True
    return False


def _status_reason(status: int) -> Reason:
    return _STATUSES.get(status, Reason.SERVER_ERROR if status >= 500 else Reason.STATUS)


def _refusal(error: Exception) -> Refusal:
    """Name a failure; without its text, which holds addresses and differs from run to run."""
    if isinstance(error, aiohttp.ClientConnectorError) and error.errno == errno.EACCES:
        return Refusal(Reason.ADDRESS)
    for kind, reason in _ERRORS:
        if isinstance(error, kind):
            return Refusal(reason)
    return Refusal(Reason.BAD_URL, type(error).__name__)  # yarl and idna raise of all kinds


_ERRORS: tuple[tuple[type[Exception], Reason], ...] = (
    (TimeoutError, Reason.TIMEOUT),
    (aiohttp.InvalidURL, Reason.BAD_URL),
    (aiohttp.NonHttpUrlClientError, Reason.BAD_URL),
    (aiohttp.TooManyRedirects, Reason.REDIRECTS),
    (aiohttp.ClientConnectorDNSError, Reason.NAME),
    (aiohttp.ClientSSLError, Reason.TLS),
    (aiohttp.ClientPayloadError, Reason.CUT_OFF),
    (aiohttp.ClientError, Reason.CONNECTION),
    (OSError, Reason.CONNECTION),
)
