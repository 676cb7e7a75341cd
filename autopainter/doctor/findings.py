"""What a check found, in words for people."""

import os
import re
from dataclasses import dataclass, replace
from enum import StrEnum

from autopainter.errors import one_line

__all__ = ["Finding", "Result", "failed", "gib", "ok", "one_line", "skipped", "warning", "without_secrets"]

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")
_SHORTEST_SECRET = 4  # shorter values stand in any text
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")


class Result(StrEnum):
    """How a check ended; only ``FAILED`` makes the command fail."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One row of the report.

    Attributes:
        check: what was looked at.
        result: how it ended.
        detail: what was seen, or why nothing was.
        advice: what to do; of every warning and failure.
    """

    check: str
    result: Result
    detail: str
    advice: str = ""


def ok(check: str, detail: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(check, Result.OK, detail)


def warning(check: str, detail: str, advice: str) -> Finding:
    """Training can begin, but somebody should know."""
    return Finding(check, Result.WARNING, detail, advice)


def failed(check: str, detail: str, advice: str) -> Finding:
    """Training would fail here."""
    return Finding(check, Result.FAILED, detail, advice)


def skipped(check: str, why: str) -> Finding:
    """A check that could not be made, or that nobody needs."""
    return Finding(check, Result.SKIPPED, why)


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / 2**30:.1f} GiB"


def without_secrets(finding: Finding) -> Finding:
    """A finding that can be shown to anybody: errors of other programs may repeat what they were given."""
    return replace(finding, detail=_masked(finding.detail), advice=_masked(finding.advice))


def _masked(text: str) -> str:
    for name in _SECRETS:
        secret = os.environ.get(name, "")
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return _USER_INFO.sub("***@", text)
