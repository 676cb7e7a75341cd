"""What this container may use, and what became of it, as the kernel's control groups (version 1 or 2) say."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_NO_LIMIT_BYTES = 1 << 60  # how version 1 says that there is none: a number near 2**63


class _Memory(NamedTuple):
    """Names of a version's files, and of the line in ``memory.stat`` that counts idle pages of files.

    Both numbers of use are with the groups below.
    """

    controller: str  # only groups of version 1 have one
    limit: str
    used: str
    idle: str
    kills: str


_MEMORY = (
    _Memory("", "memory.max", "memory.current", "inactive_file", "memory.events"),
    _Memory("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"),
)


class Groups:
    """The control groups of this process.

    Args:
        root: where the file systems of control groups are.
        own: the file that says which groups the process is in.
    """

    def __init__(self, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> None:
        self._root = root
        try:
            self._own = [line.split(":", 2) for line in own.read_text().splitlines()]
        except OSError:  # no Linux
            self._own = []

    def memory_bytes(self) -> int | None:
        """Most memory in bytes, None if nothing limits it."""
        return min((limit for limit, _, _ in self._limits()), default=None)

    def used_bytes(self) -> int | None:
        """Memory in use in bytes, of what is limited to ``memory_bytes``; None if nothing limits it.

        What the kernel would give back at once, file pages that were not used lately, does not count.
        """
        for _, group, names in sorted(self._limits())[:1]:
            with contextlib.suppress(OSError):
                used = int((group / names.used).read_text())
                return used - (_count((group / "memory.stat").read_text(), names.idle) or 0)
        return None

    def memory_kills(self) -> int:
        """Processes that the kernel has killed for memory since the group was made; 0 if it does not count them."""
        for names in _MEMORY:
            for _, text in self._settings(names.kills, names.controller):
                if (kills := _count(text, "oom_kill")) is not None:
                    return kills
        return 0

    def cores(self) -> float | None:
        """Most processor time in cores, None if nothing limits it."""
        said = [text for _, text in self._settings("cpu.max")]
        quotas, periods = (self._settings(f"cpu.cfs_{name}_us", "cpu") for name in ("quota", "period"))
        said += [f"{quota} {period}" for (_, quota), (_, period) in zip(quotas, periods, strict=False)]
        return min(
            (int(quota) / int(period) for quota, period in map(str.split, said) if quota.isdigit()), default=None
        )

    def usable_cores(self) -> int:
        """Cores that this process can keep busy: those it is bound to, as far as it has time for them; at least 1."""
        bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(int(min(bound, self.cores() or bound)), 1)

    def _limits(self) -> Iterator[tuple[int, Path, _Memory]]:
        """Every limit of memory in bytes, its group's folder, and the names in there."""
        for names in _MEMORY:
            for group, text in self._settings(names.limit, names.controller):
                if text.isdigit() and int(text) < _NO_LIMIT_BYTES:
                    yield int(text), group, names

    def _settings(self, name: str, controller: str = "") -> Iterator[tuple[Path, str]]:
        """A file's text in the process's group and in all above it, with the group's folder."""
        for _, controllers, path in self._own:
            if controller not in controllers.split(","):
                continue
            for above in (Path(path), *Path(path).parents):
                group = self._root / controller / str(above).lstrip("/")
                try:
                    yield group, (group / name).read_text().strip()
                except OSError:  # a container sees its own group as the root, though it may be told another path
                    continue


def _count(text: str, name: str) -> int | None:
    found = re.search(rf"^{name} (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None
