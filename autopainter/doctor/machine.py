"""Checks of the machine, or of the container: processor, memory, folders, clock."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil

import autopainter
from autopainter.cgroup import Groups
from autopainter.config import Config
from autopainter.doctor import folders, versions
from autopainter.doctor.findings import Finding, gib, ok, one_line, warning

_LEAST_CORES = 2
_LEAST_MEMORY_BYTES = 4 << 30
_LEAST_SHARED_BYTES = 1 << 30
_LEAST_TEMPORARY_BYTES = 1 << 30


def check(config: Config | None) -> Iterator[Finding]:
    """Check what this process runs on."""
    yield versions.python()
    yield versions.packages()
    yield cores()
    yield memory()
    yield shared_memory()
    change = "set TMPDIR to a folder with space"
    yield folders.check("temporary folder", tempfile.gettempdir, _LEAST_TEMPORARY_BYTES, change)
    if config is not None and (cache := config.data.cache):
        change = "choose another data.cache or a smaller data.cache_gib"
        yield folders.check("data.cache", lambda: cache, int(config.data.cache_gib * 2**30), change)
    yield clock()


def cores() -> Finding:
    """Processor cores that this process may use."""
    groups = Groups()
    quota, detail = groups.cores(), f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    if quota is not None:
        detail += f", limited to the time of {quota:g}"
    if groups.usable_cores() < _LEAST_CORES:
        advice = f"give it {_LEAST_CORES} cores or more: training, decoding and uploading run beside each other"
        return warning("processor", detail, advice)
    return ok("processor", detail)


def memory() -> Finding:
    """Memory of the machine and of the container."""
    whole, limit = psutil.virtual_memory(), Groups().memory_bytes()
    detail = f"{gib(whole.total)}, {gib(whole.available)} of them available"
    if limit is not None and limit < whole.total:
        detail += f"; this container may use {gib(limit)}"
    if min(whole.total, limit or whole.total) < _LEAST_MEMORY_BYTES:
        advice = (
            f"give it {gib(_LEAST_MEMORY_BYTES)} or more a worker (docker run --memory, resources.limits: memory):"
            " the state of the default model alone is 0.9 GB, and a checkpoint copies it"
        )
        return warning("memory", detail, advice)
    return ok("memory", detail)


def shared_memory(path: str = "/dev/shm") -> Finding:
    """The file system that Ray's objects and NCCL's buffers are in."""
    try:
        size = shutil.disk_usage(path)
        with tempfile.TemporaryFile(dir=path):
            pass
        detail, enough = f"{path}: {gib(size.total)}, {gib(size.free)} free", size.total >= _LEAST_SHARED_BYTES
    except OSError as error:
        detail, enough = f"{path}: {one_line(error)}", False
    if enough:
        return ok("shared memory", detail)
    advice = (
        f"make it {gib(_LEAST_SHARED_BYTES)} or more, for NCCL and Ray: docker run --shm-size=2g, or an emptyDir with"
        " medium: Memory mounted at /dev/shm"
    )
    return warning("shared memory", detail, advice)


def clock() -> Finding:
    """This machine's clock, as far as it can be judged alone; each storage is another witness."""
    now, installed = time.time(), Path(autopainter.__file__).stat().st_mtime
    detail = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    if now < installed:
        return warning("clock", f"{detail}, before this program was installed", "set the clock (NTP)")
    return ok("clock", detail)
