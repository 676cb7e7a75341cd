"""The journal of a run: what stopped it, from failed workers to a person's Ctrl-C, kept beside its checkpoints."""

import dataclasses
import json
import logging
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

from autopainter.errors import UserError
from autopainter.storage import Store

log = logging.getLogger(__name__)

Kind = Literal[
    "killed", "preempted", "host memory", "gpu memory", "hang", "storage", "error", "diverged", "stopped", "superseded"
]  # fmt: skip

_KEPT = 500


@dataclass(frozen=True)
class Entry:
    """One event.

    Attributes:
        kind: what it was.
        text: one line for people.
        step: step that it happened at, or that of the newest checkpoint; None if unknown.
        time: Unix time.
    """

    kind: Kind
    text: str
    step: int | None
    time: float


def write(run: Store, kind: Kind, text: str, step: int | None) -> None:
    """Add an entry. A journal that cannot be written is a warning: it must not be one more reason to stop."""
    entry = Entry(kind, " ".join(text.split())[:2000], step, time.time())
    try:
        run.create(f"journal/{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json", json.dumps(asdict(entry)).encode())
        run.delete(old.key for old in run.list("journal/")[:-_KEPT])
    except (OSError, UserError) as error:
        log.warning("the journal could not be written: %s", error)


def read(run: Store) -> list[Entry]:
    """The last entries, oldest first; damaged ones are passed over."""
    entries = []
    for stored in run.list("journal/"):
        try:
            entry = Entry(**json.loads(run.read(stored.key)))
            entries.append(dataclasses.replace(entry, text=str(entry.text), time=float(entry.time)))
        except (ValueError, TypeError, FileNotFoundError) as error:
            log.warning("%s: damaged, passed over: %s", run.locate(stored.key), error)
    return entries


def counts(run: Store) -> Counter[str]:
    """Number of entries of each kind."""
    return Counter(entry.kind for entry in read(run))
