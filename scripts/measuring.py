"""What the scripts share: memory of a process tree over time, the machine, a configuration for benchmarks."""

import contextlib
import os
import platform
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from autopainter import config as configuration
from autopainter.cgroup import Groups
from autopainter.config import Config

MEMORY_SECONDS = 0.2


class MemoryWatch(threading.Thread):
    """Memory of a process and its descendants over time: the sum of PSS, in which shared pages count once.

    Args:
        root: the process.
        without: a descendant that is left out, such as a server, with its own descendants.

    Attributes:
        history_bytes: one value for each ``period_seconds``.
    """

    def __init__(self, root: int, period_seconds: float = MEMORY_SECONDS, without: int = 0) -> None:
        super().__init__(daemon=True)
        self.root, self.period_seconds, self.without = root, period_seconds, without
        self.history_bytes: list[int] = []
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(self.period_seconds):
            counted = process_tree(self.root) - (process_tree(self.without) if self.without else set())
            self.history_bytes.append(sum(pss_bytes(pid) for pid in counted))

    @property
    def peak_bytes(self) -> int:
        """The largest value so far."""
        return max(self.history_bytes, default=0)

    def stop(self) -> int:
        """End watching; the peak in bytes."""
        self._done.set()
        self.join()
        return self.peak_bytes


def process_tree(root: int) -> set[int]:
    """A process and all its living descendants."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # ended
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process; 0 if it has ended."""
    with contextlib.suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


def cpu() -> str:
    """Model and number of the cores that this process may use."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{model[1] if model else platform.machine()}, {Groups().usable_cores()} cores"


def bench_config(fields: Mapping[str, object], given: Iterable[str] = ()) -> Config:
    """A configuration by dotted field names; what nothing is written to or read from has names of no use.

    Args:
        given: FIELD=VALUE of the command line, which win.
    """
    unused = {"run.name": "bench", "run.storage": "unused", "data.manifest": "unused", "train.steps": 2}
    settings = [f"{name}={value}" for name, value in (unused | dict(fields)).items()]
    return configuration.load(None, [*settings, *given], environment={})
