"""What this container may use, as the kernel's control groups (version 1 or 2) say."""

from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT_BYTES = 1 << 60  # how version 1 says that there is none: a number near 2**63


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
        said = [*self._settings("memory.max"), *self._settings("memory.limit_in_bytes", "memory")]
        return min((int(text) for text in said if text.isdigit() and int(text) < _NO_LIMIT_BYTES), default=None)

    def cores(self) -> float | None:
        """Most processor time in cores, None if nothing limits it."""
        said = [*self._settings("cpu.max")]
        files = self._settings("cpu.cfs_quota_us", "cpu"), self._settings("cpu.cfs_period_us", "cpu")
        said += map(" ".join, zip(*files, strict=False))
        return min(
            (int(quota) / int(period) for quota, period in map(str.split, said) if quota.isdigit()), default=None
        )

    def _settings(self, name: str, controller: str = "") -> Iterator[str]:
        """A setting of the process's group and of all above it; only groups of version 1 have a controller."""
        for _, controllers, path in self._own:
            if controller not in controllers.split(","):
                continue
            for group in (Path(path), *Path(path).parents):
                try:
                    yield (self._root / controller / str(group).lstrip("/") / name).read_text().strip()
                except OSError:  # a container sees its own group as the root, though it may be told another path
                    continue
