"""The lines of Ray's processes in the driver's log."""

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import ray._private.worker

from autopainter import logs


def log_as(form: logs.Format) -> None:
    """Let Ray's loggers in this process, driver or worker, speak like the program's own."""
    if form == "json":
        for logger in (logging.getLogger(), logging.getLogger("ray"), logging.getLogger("ray.train")):
            for handler in logger.handlers:
                # Ray's handler in a worker formats by one of its own.
                for plain in (handler, getattr(handler, "plain_handler", None)):
                    if isinstance(plain, logging.StreamHandler):
                        plain.setFormatter(logs.formatter(form))


def forward_as(form: logs.Format) -> None:
    """Before this driver connects: how it shows what others write. Ray's own way puts a prefix before each line."""
    if form == "json":
        ray._private.worker.print_to_stdstream = _forward
    elif not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # Ray colours its prefixes in files too


def _forward(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    about = {"pid": data.get("pid"), "ip": data.get("ip"), "process": data.get("actor_name") or "ray"}
    texts = data["lines"]
    if about["pid"] == "autoscaler":  # of its whole log, a table every five seconds, only what happened
        texts = ray._private.worker.filter_autoscaler_events(texts)
    for line in (line for text in texts for line in text.splitlines()):
        sys.stderr.write(f"{logs.as_json(line, **about)}\n")  # whole, because other threads log too
