"""When memory runs out: two ladders of settings that need less of it and change no result but the order of additions.

GPU: activation checkpointing of the outer blocks, then of all, then half the images at once, down to one.
Host: half the batches and chunks ahead and half the threads, without a cache in memory, down to one of each.

Each step down is a record in the run (``memory/0001.json``, ...), so a later start does not meet the same end again. A
record holds for the machine and the settings that it was made under: on a larger GPU, or after the configuration's own
knobs were turned, a run begins at the top again.
"""

import contextlib
import ctypes
import gc
import json
import logging
import os
import re
import tempfile
import time
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import psutil
import torch

from autopainter import journal
from autopainter.cgroup import Groups
from autopainter.config import Config, Recompute
from autopainter.errors import UserError
from autopainter.storage import Store

log = logging.getLogger(__name__)

Kind = Literal["gpu", "host"]

_RECOMPUTE: tuple[Recompute, ...] = typing.get_args(Recompute)  # each takes less memory than the one before
_ALLOCATION_FAILED = re.compile(
    r"out of memory|ALLOC(ATION)?_FAILED|can't allocate memory|not enough memory|insufficient memory", re.IGNORECASE
)
# What cuDNN and cuBLAS say when there is no room for their own: a GPU without the kernels is refused at the start.
_NO_WORKSPACE = re.compile(r"unable to find an engine to execute|CUBLAS_STATUS_NOT_INITIALIZED")
_HOST_LEVELS = 6  # after so many halvings everything is at its least
_HOST_KNOBS = {"prefetch_batches": 1, "fetch_ahead_batches": 0, "fetch_threads": 1, "decode_threads": 1}  # and that


@dataclass(frozen=True)
class Rung:
    """How much of the GPU's memory a step takes.

    Attributes:
        recompute: as ``train.activation_checkpointing``.
        microbatch: images that a worker computes at once.
    """

    recompute: Recompute
    microbatch: int


def rungs(config: Config, world: int) -> list[Rung]:
    """What a configuration asks for, then ever less."""
    recompute, microbatch = config.train.activation_checkpointing, config.train.microbatch
    ladder = [Rung(recompute, microbatch or config.train.global_batch // world)]
    if config.model.norm == "batch":
        return ladder  # its statistics depend on the microbatch, and recomputing would count them twice
    ladder += [Rung(more, ladder[0].microbatch) for more in _RECOMPUTE[_RECOMPUTE.index(recompute) + 1 :]]
    while ladder[-1].microbatch > 1:
        ladder.append(Rung("all", ladder[-1].microbatch // 2))
    return ladder


def ran_out(error: BaseException) -> Kind | None:
    """Which memory an error says was too small; None if it says nothing of the kind."""
    if isinstance(error, torch.OutOfMemoryError):
        return "gpu"
    if isinstance(error, MemoryError):
        return "host"
    if isinstance(error, RuntimeError) and _NO_WORKSPACE.search(str(error)):
        return "gpu"
    if isinstance(error, RuntimeError | cv2.error) and _ALLOCATION_FAILED.search(str(error)):
        return "gpu" if re.search(r"\bcu[A-Z]|CUDA|CUBLAS|CUDNN", str(error)) else "host"
    return None


def free() -> None:
    """Give back what a failed step held. Call it when nothing refers to the step's tensors, its exception included."""
    # A backward pass that fails leaves its graph in autograd's queue until the next one empties that.
    torch.zeros((), requires_grad=True).backward()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim() -> None:
    """Give pages that nothing is in any more back to the system.

    glibc keeps what many threads have freed for each of them; left alone, a worker grows for hours.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# Records in the run


def _step_down(run: Store, kind: Kind, origin: Mapping[str, Any], change: Mapping[str, Any], text: str) -> None:
    """Say so and record it. Of several workers that meet the same end at once, the first one's record stands."""
    log.warning("%s out of memory%s", "GPU" if kind == "gpu" else kind, text)
    record = {"kind": kind, "origin": origin, "time": time.time(), **change}
    try:
        run.create(f"memory/{len(run.list('memory/')) + 1:04d}.json", json.dumps(record, indent=1).encode())
    except (OSError, UserError) as error:
        log.warning("the step down could not be recorded, the next start will meet the same end: %s", error)
    journal.write(run, "gpu memory" if kind == "gpu" else "host memory", f"out of memory{text}", change.get("step"))


def _records(run: Store, kind: Kind, origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for entry in run.list("memory/"):
        try:
            record = json.loads(run.read(entry.key))
            if record["kind"] == kind and record["origin"] == origin:
                found.append(record)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            log.warning("%s: damaged, passed over: %s", run.locate(entry.key), error)
    return found


class GpuLadder:
    """The rung that a run stands on.

    Args:
        run: the run's store.
        device: its name and memory decide, with the configuration's own knobs, whether a record still holds.

    Attributes:
        depth: rungs below the configuration's own.
    """

    def __init__(self, run: Store, config: Config, world: int, device: torch.device) -> None:
        self._run = run
        self._rungs = rungs(config, world)
        self._origin = {"device": _describe(device), "world": world, "top": asdict(self._rungs[0])}
        self.depth = max((record["depth"] for record in _records(run, "gpu", self._origin)), default=0)

    @property
    def rung(self) -> Rung:
        """What a step may take now."""
        return self._rungs[self.depth]

    def step_down(self, step: int, reason: str) -> bool:
        """Take the next rung, say so and record it; False at the bottom."""
        if self.depth + 1 == len(self._rungs):
            return False
        before, self.depth = self.rung, self.depth + 1
        change = f"microbatch {before.microbatch} -> {self.rung.microbatch}"
        if self.rung.microbatch == before.microbatch:
            change = f"activation checkpointing {before.recompute} -> {self.rung.recompute}"
        record = {"step": step, "reason": reason, "depth": self.depth, **asdict(self.rung)}
        _step_down(self._run, "gpu", self._origin, record, f" at step {step}: {change} ({reason})")
        return True


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.total_memory >> 20} MiB"


# The host


def _host_origin(config: Config, world: int) -> dict[str, Any]:
    return {"world": world, "data": config.data.model_dump(mode="json", exclude={"manifest"})}


def note_host(run: Store, config: Config, world: int, reason: str) -> None:
    """Record that the host's memory was too small, and give up some of what is left to give up.

    If storage does not take part, that is a warning: the failure itself is what has to be dealt with.
    """
    origin = _host_origin(config, world)
    try:
        level = len(_records(run, "host", origin)) + 1
    except (OSError, UserError) as error:
        log.warning("%s; that could not be recorded, the next start will meet the same end: %s", reason, error)
        return
    if level <= _HOST_LEVELS:
        change = {"level": level, "reason": reason}
        _step_down(run, "host", origin, change, f": level {level}, fewer batches ahead and threads ({reason})")
    else:
        journal.write(run, "host memory", reason, None)


def within_host(run: Store, config: Config, world: int) -> Config:
    """The configuration with what the run's records leave of read-ahead, threads and cache in memory."""
    level = len(_records(run, "host", _host_origin(config, world)))
    if not level:
        return config
    data = config.data
    less: dict[str, Any] = {name: max(getattr(data, name) >> level, least) for name, least in _HOST_KNOBS.items()}
    if data.cache and _in_memory(Path(data.cache)):
        less["cache"] = None
    log.info("host memory level %d: %s", level, ", ".join(f"data.{name}={value}" for name, value in less.items()))
    return config.model_copy(update={"data": data.model_copy(update=less)})


def _in_memory(path: Path) -> bool:
    """Whether a folder lies in a file system that is memory."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.absolute().is_relative_to(part.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda part: len(part.mountpoint)).fstype in ("tmpfs", "ramfs")


def note_kernel_kills(run: Store, config: Config, world: int, groups: Groups) -> None:
    """Record it if the kernel has killed a process of this container for memory since a worker of the run last looked.

    Ray sees only that a worker is gone. The kernel counts such kills for each container, and what a worker saw last is
    kept in a file of this machine for the next start of the run, until one ends in good order.
    """
    now = groups.memory_kills()
    path = _kills_seen(run)
    try:
        before = int(path.read_text())
    except (OSError, ValueError):
        before = now
    if now != before or not path.exists():
        with contextlib.suppress(OSError):  # a read-only place: then nothing is known
            path.write_text(str(now))
    if now > before:
        note_host(run, config, world, f"the kernel killed {now - before} process(es) of this container")


def forget_kernel_kills(run: Store) -> None:
    """Leave nothing on this machine: the run ended in good order."""
    with contextlib.suppress(OSError):  # another worker of this machine was first, or nothing could be written
        _kills_seen(run).unlink()


def _kills_seen(run: Store) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", run.uri.lower())[-80:]
    return Path(tempfile.gettempdir()) / f"autopainter-memory-{os.getuid()}{name}"
