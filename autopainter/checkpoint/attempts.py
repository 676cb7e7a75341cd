"""Attempts: each start of a run takes a number, and only the one with the highest may write."""

import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autopainter.storage import Store

log = logging.getLogger(__name__)

_KEPT = 100  # records of earlier attempts


@dataclass(frozen=True)
class Attempt:
    """The record of one start of a run.

    Attributes:
        number: its number.
        started: Unix time.
        step: steps that were done before it; None if it trained nothing.
        workers: its worker processes; None if it trained nothing.
        pulled_from: the run that a checkpoint was copied from, if that is what the number was taken for.
        overwrites: whether it was taken to delete the run that was there.
    """

    number: int
    started: float
    step: int | None = None
    workers: int | None = None
    pulled_from: str | None = None
    overwrites: bool = False


def begin_attempt(run: Store, info: Mapping[str, Any]) -> int:
    """Take the next attempt number; from then on checkpoints of earlier attempts are refused."""
    while True:
        numbers = _numbers(run)
        number = max(numbers, default=0) + 1
        record = json.dumps({"attempt": number, "id": uuid.uuid4().hex, "started": time.time(), **info}).encode()
        if run.create(_key(number), record):
            run.delete(_key(old) for old in numbers if old <= number - _KEPT)
            return number


def latest_attempt(run: Store) -> int:
    """The highest attempt number, 0 before the first."""
    return max(_numbers(run), default=0)


def read_attempts(run: Store) -> list[Attempt]:
    """The records of the last attempts, by number; damaged ones are named in a warning and passed over."""
    found = []
    for number in sorted(_numbers(run)):
        try:
            found.append(_decode(number, json.loads(run.read(_key(number)))))
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            log.warning("%s: damaged, passed over: %s", run.locate(_key(number)), error)
    return found


def _decode(number: int, record: Any) -> Attempt:
    step, workers = (None if record.get(name) is None else int(record[name]) for name in ("step", "workers"))
    source = record.get("pulled_from")
    return Attempt(
        number, float(record["started"]), step, workers, source and str(source), bool(record.get("overwrites"))
    )


def _numbers(run: Store) -> list[int]:
    found = [re.fullmatch(r"attempts/(\d{6})\.json", entry.key) for entry in run.list("attempts/")]
    return [int(match[1]) for match in found if match]


def _key(number: int) -> str:
    return f"attempts/{number:06d}.json"
