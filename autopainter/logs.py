"""What a program says while it runs: plain lines for people, on request JSON lines for machines; always on stderr."""

import json
import logging
import sys
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

Format = Literal["text", "json"]

_FIELDS = {"asctime": "time", "levelname": "level", "name": "logger", "message": "message"}


def setup(form: Format = "text") -> None:
    """Log to stderr.

    Args:
        form: ``text``: a line each with its time; ``json``: an object a line, with ``time``, ``level``, ``logger``,
            ``message`` and what else the record brings (``step`` and losses of a progress line, ``exc_info``).
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("botocore").setLevel(logging.WARNING)
    logging.captureWarnings(form == "json")


def structured() -> bool:
    """Whether this process logs JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def formatter(form: Format) -> logging.Formatter:
    """The formatter of ``setup``."""
    if form == "text":
        return logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    wanted = "".join(f"%({name})" for name in _FIELDS)
    return JsonFormatter(wanted, "%Y-%m-%dT%H:%M:%S%z", rename_fields=_FIELDS, reserved_attrs=_reserved())


def _reserved() -> list[str]:
    """What every record has and nobody asked for."""
    return [*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "_ray_timestamp_ns"]


def as_json(line: str, **about: object) -> str:
    """A line of another process as JSON: with ``about`` added if it is an object already, else as its message."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        record = {"message": line}
    return json.dumps(record | about)
