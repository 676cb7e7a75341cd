"""Who may ask the server, and what is said about requests that are no HTTP."""

import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Set

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Middleware

log = logging.getLogger(__name__)
"""Of the server: without the tracebacks of malformed requests, which only their client can mend, and is told."""

log.addFilter(
    lambda record: (
        not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))
    )
)


def names(listener: socket.socket, host: str) -> Set[str] | None:
    """Host names that the server answers to; none: to all.

    A page of another site can let its own name point to this machine (DNS rebinding). Then the browser takes the server
    for a part of that site, and only the name tells. A server that others reach has names that it does not know.

    Args:
        host: what it was told to listen on.
    """
    if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        return None
    return {"localhost", "127.0.0.1", "[::1]", host.lower(), f"[{host}]"}


def only_to(known: Set[str] | None) -> Middleware:
    """Refuses requests to other host names than these."""

    @web.middleware
    async def check(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        asked = re.sub(r":\d*$", "", request.headers.get("Host", "")).lower()
        if known is not None and asked not in known:
            raise web.HTTPForbidden(text="The page is for this machine only: open it as localhost or 127.0.0.1.")
        return await handler(request)

    return check
