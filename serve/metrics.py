"""Metrics, on Ray's metrics port as `ray_udiff_*`; without Ray they count nothing."""

from ray.serve.metrics import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROW_BOUNDARIES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]


class RequestCounter:
    """ASGI middleware: count requests by the status of their answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._requests = Counter(
            "udiff_requests", description="Requests answered, by status.", tag_keys=("status",)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and count when it is over."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 500  # what the server makes of an exception

        async def send_watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        finally:
            self._requests.inc(tags={"status": str(status)})


def output_counter() -> Counter:
    """Count the pictures and texts that were made."""
    return Counter("udiff_outputs", description="Outputs made, by task.", tag_keys=("task",))


def tick_histogram() -> Histogram:
    """Observe the rows of each network call; its count is the number of ticks."""
    return Histogram(
        "udiff_tick_rows", description="Rows of a network call.", boundaries=ROW_BOUNDARIES
    )
