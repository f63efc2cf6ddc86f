"""What stands around Ray Serve's own HTTP proxy, which has no limits.

The proxy reads a body whether or not the application wants it, so the limit must stand before it.
Serve finds `middleware` by an environment variable, which must be set before Ray starts.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

from starlette.middleware import Middleware

from serve.limits import BodyLimit, Limits

_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def middleware() -> list[Middleware]:
    """Make what each proxy puts around itself."""
    return [Middleware(BodyLimit, limits=Limits())]


def install(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have the proxies of a Ray that starts with this environment use `middleware`."""
    root = str(Path(__file__).parents[1])
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([root, *filter(None, paths)]))
    environment[_CALLBACK] = f"{__name__}:{middleware.__name__}"
