"""What one request may cost: bytes and time to send it, requests at once, time to answer it."""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, error_response

Answer = TypeVar("Answer")

CLIENT_CLOSED_REQUEST = 499
PICTURE_PATHS = ("/v1/chat/", "/v1/tasks/")


@dataclass(frozen=True)
class Limits:
    """Bounds of the front; a request beyond one of them gets its 4xx."""

    max_body_bytes: int = 64 * 1024
    max_picture_body_bytes: int = 16 * 2**20
    """Of the endpoints that take pictures."""
    body_timeout_s: float = 10.0
    """Time that a client has to send its body."""
    max_requests: int = 64
    """Requests in work or waiting at once; one more gets 429."""
    retry_after_s: int = 2
    deadline_s: float = 120.0
    """Time in which a request is answered, waiting included; after it 504."""


class BodyLimit:
    """ASGI middleware: answer 413 to a body that is too long, and 408 to one that drips.

    A body that says how long it is is refused before any of it is read, a chunked one at the limit.
    It stands around the front and, as Serve's proxy reads bodies on its own, around the proxy.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with the body counted as it is read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope["path"])
        if _announced_bytes(Headers(scope=scope)) > limit:
            await error_response(_too_long(limit))(scope, receive, send)
            return
        body = _CountedBody(receive, limit, self._limits.body_timeout_s)

        async def send_unless_refused(message: Message) -> None:
            if body.refusal is None:
                await send(message)

        try:
            await self._app(scope, body.receive, send_unless_refused)
        except Exception:
            if body.refusal is None:
                raise
        if body.refusal is not None:
            await error_response(body.refusal)(scope, receive, send)

    def _limit(self, path: str) -> int:
        if path.startswith(PICTURE_PATHS):
            return self._limits.max_picture_body_bytes
        return self._limits.max_body_bytes


class _CountedBody:
    """A body on its way in; beyond its bounds the client seems to be gone to what reads it."""

    def __init__(self, receive: Receive, limit: int, timeout_s: float) -> None:
        self.refusal: ApiError | None = None
        self._receive = receive
        self._limit = limit
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._num_bytes = 0
        self._is_complete = False

    async def receive(self) -> Message:
        """Give the next part of the body, or what comes after it."""
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            return self._refuse(ApiError(408, "The body did not arrive in time.", code="timeout"))
        self._num_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._num_bytes > self._limit:
            return self._refuse(_too_long(self._limit))
        return message

    def _refuse(self, refusal: ApiError) -> Message:
        self.refusal, self._is_complete = refusal, True
        return {"type": "http.disconnect"}


def _announced_bytes(headers: Headers) -> int:
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


def _too_long(limit: int) -> ApiError:
    return ApiError(413, f"The body is over the limit of {limit} bytes.", code="body_too_large")


class Admission:
    """Count the requests under way and turn away those beyond the bound."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._num_requests = 0

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold one place; raise 429 with Retry-After when all are taken."""
        if self._num_requests >= self._limits.max_requests:
            raise ApiError(
                429,
                f"{self._num_requests} requests are under way, the most that are taken at once.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(self._limits.retry_after_s)},
            )
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1


async def answer_in_time(
    http: Request, work: Coroutine[Any, Any, Answer], *, deadline_s: float
) -> Answer:
    """Await the answer for as long as its client is there and the deadline has not passed.

    Serve cancels a handler whose client has left unless the client's headers say otherwise, and
    other servers do not, so the connection is watched here. The body must have been read.

    Raises:
        ApiError: 504 after the deadline, 499 (that nobody reads) when the client has left.
    """
    job = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(http))
    try:
        done, _ = await asyncio.wait(
            {job, watcher}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED
        )
        if job in done:
            return job.result()
    finally:
        await _cancel(job, watcher)
    if watcher in done:
        raise ApiError(CLIENT_CLOSED_REQUEST, "The client closed the connection.")
    raise ApiError(504, f"No answer within {deadline_s:g} s.", code="timeout")


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
