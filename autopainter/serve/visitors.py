"""What the server says about requests that are no HTTP: nothing on stderr."""

import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

log = logging.getLogger(__name__)
"""Of the server: without the tracebacks of malformed requests, which only their client can mend, and is told."""

log.addFilter(
    lambda record: (
        not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))
    )
)
