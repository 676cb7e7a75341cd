"""What a failure of the worker group says: its kind, a line for people, and whether another start would mend it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import ray.exceptions

from autopainter import memory
from autopainter.errors import CheckpointTooOld, Diverged, StorageError, Superseded, UserError
from autopainter.journal import Kind

_FINAL = (UserError, Diverged, Superseded, CheckpointTooOld)
_DEATHS = (ray.exceptions.RayActorError, ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError)
# How a worker hears that another one is gone, if Ray asks it before it has missed that one.
_PEER_LOST = re.compile(
    r"gloo/transport/\S+ .*?(closed by peer|reset by peer|Broken pipe)|ncclRemoteError", re.IGNORECASE | re.DOTALL
)
_HANG = re.compile(r"timed? ?out|watchdog", re.IGNORECASE)
# What Ray says of a death; it goes on with all that may kill a process anywhere.
_DEATH = re.compile(r"Worker exit type: (\w+) Worker exit detail: (.*?\.) Some common causes")
_TEXT = 200  # characters of one worker's cause

# When workers fail in several ways, the first of these is the reason and the others follow from it.
_TELLING: tuple[Kind, ...] = (
    "host memory", "gpu memory", "preempted", "killed", "storage", "hang", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """Why the group failed.

    Attributes:
        kind: the most telling of its workers' causes.
        text: one line: which workers failed, and how.
        ray_memory_monitor: Ray itself killed a worker because the host's memory was nearly full.
    """

    kind: Kind
    text: str
    ray_memory_monitor: bool


def explain(error: BaseException) -> Failure:
    """The failure behind an error of Ray Train's ``fit``."""
    causes = dict(_causes(error))
    kinds = {_kind(cause) for cause in causes.values() if not _PEER_LOST.search(str(cause))} or {"killed"}
    text = "; ".join(f"{where}{_line(cause)}" for where, cause in sorted(causes.items()))
    monitor = any(isinstance(cause, ray.exceptions.OutOfMemoryError) for cause in causes.values())
    return Failure(next(kind for kind in _TELLING if kind in kinds), text, monitor)


def final(error: BaseException) -> BaseException | None:
    """What is behind a failure if another start would only meet it again."""
    return next((cause for _, cause in _causes(error) if isinstance(cause, _FINAL)), None)


def _causes(error: BaseException) -> Iterator[tuple[str, BaseException]]:
    """Where and what: for each worker that failed, else for the controller."""
    workers = getattr(error, "worker_failures", {})
    for rank, failure in workers.items():
        yield f"worker {rank}: ", getattr(failure, "health_check_failure", None) or failure
    if not workers:
        yield "", getattr(error, "controller_failure", None) or error


def _kind(cause: BaseException) -> Kind:
    if isinstance(cause, ray.exceptions.OutOfMemoryError):
        return "host memory"
    if ran_out := memory.ran_out(cause):
        return "gpu memory" if ran_out == "gpu" else "host memory"
    if getattr(cause, "preempted", False):
        return "preempted"
    if isinstance(cause, _DEATHS):
        return "killed"
    if isinstance(cause, StorageError | OSError):
        return "storage"
    return "hang" if _HANG.search(str(cause)) else "error"


def _line(cause: BaseException) -> str:
    """A cause in one line; of a long one, such as a traceback, the beginning and the last line."""
    text = " ".join(str(cause).split())
    if isinstance(cause, _DEATHS) and (death := _DEATH.search(text)):
        return f"its process was killed or crashed ({death[1]}: {death[2]})"
    if len(text) > _TEXT:
        last = str(cause).strip().splitlines()[-1].strip()
        text = f"{text[: _TEXT // 2]} ... {last[-_TEXT // 2 :]}"
    return f"{type(cause).__name__}: {text}"
