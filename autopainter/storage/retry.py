"""Trying again, with back-off and a budget of time."""

import logging
import math
import os
import threading
from collections.abc import Callable
from typing import TypeVar

import tenacity

from autopainter.errors import StorageError, UserError

log = logging.getLogger(__name__)


def _seconds(variable: str, default: float, least: float) -> float:
    """A duration from the environment; ``UserError`` if it is none, or shorter than ``least``."""
    text = os.environ.get(variable) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not least <= seconds < math.inf:
        raise UserError(f"{variable}: must be a number of seconds, at least {least:g}, got {text!r}")
    return seconds


RETRY_SECONDS = _seconds("AUTOPAINTER_STORAGE_RETRY_SECONDS", 60, least=0)
"""Total time that one operation may spend on retries before it fails."""

TIMEOUT_SECONDS = _seconds("AUTOPAINTER_STORAGE_TIMEOUT_SECONDS", 30, least=0.1)
"""A connection that brings nothing for so long has failed."""

T = TypeVar("T")

_counting = threading.Lock()
_retries = 0
_failures = 0


class Transient(StorageError):
    """An attempt failed in a way that another attempt may mend."""


def retry(attempt: Callable[[], T], cancelled: threading.Event | None = None) -> T:
    """Call ``attempt`` until it does not raise ``Transient``, or its time is used up; the last error is raised.

    Args:
        cancelled: nobody wants the result any more once it is set.
    """
    cancelled = cancelled or threading.Event()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Transient),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
        stop=tenacity.stop_any(tenacity.stop_after_delay(RETRY_SECONDS), tenacity.stop_when_event_set(cancelled)),
        sleep=tenacity.sleep_using_event(cancelled),
        before_sleep=_note,
        reraise=True,
    )
    try:
        return retrying(attempt)
    except StorageError:
        if not cancelled.is_set():
            _note_failure()
        raise


def retries() -> int:
    """Attempts of any operation of this process that failed and were followed by another one."""
    return _retries


def failures() -> int:
    """Operations of this process that failed for good."""
    return _failures


def _note_failure() -> None:
    global _failures
    with _counting:
        _failures += 1


def _note(state: tenacity.RetryCallState) -> None:
    global _retries
    with _counting:
        _retries += 1
    log.warning(
        "storage: attempt %d failed, trying again: %s",
        state.attempt_number,
        state.outcome.exception() if state.outcome else "",
    )
