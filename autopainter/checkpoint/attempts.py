"""Attempts: each start of a run takes a number, and only the one with the highest may write."""

import json
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from autopainter.storage import Store

_KEPT = 100  # records of earlier attempts


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


def _numbers(run: Store) -> list[int]:
    found = [re.fullmatch(r"attempts/(\d{6})\.json", entry.key) for entry in run.list("attempts/")]
    return [int(match[1]) for match in found if match]


def _key(number: int) -> str:
    return f"attempts/{number:06d}.json"
