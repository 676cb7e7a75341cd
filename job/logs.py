"""The lines of Ray's processes in the driver's log, when that is JSON."""

import logging
import sys
from collections.abc import Mapping
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher

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
    """Show what other processes write on this driver's stderr; Ray's own way puts a prefix before each line."""
    if form == "json":
        global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
        global_worker_stdstream_dispatcher.add_handler("ray_print_logs", _forward)


def _forward(batch: Mapping[str, Any]) -> None:
    about = {"pid": batch.get("pid"), "ip": batch.get("ip"), "process": batch.get("actor_name") or "ray"}
    for line in batch["lines"]:
        print(logs.as_json(line, **about), file=sys.stderr)
