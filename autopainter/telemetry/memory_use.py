"""How much memory there is, and how much of it is used, as the kernel and the GPU's driver see it."""

import contextlib
import re
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def resident() -> int:
    """Bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def host(cgroup: Path = CGROUP) -> tuple[int, int]:
    """Used and total bytes: of the container if it has a limit, else of the machine.

    What the kernel would give back at once, file pages that were not used lately, does not count as used.
    """
    machine = psutil.virtual_memory()
    for limit, usage, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):  # of cgroup 2 and 1
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            total = int((cgroup / limit).read_text())
            used = int((cgroup / usage).read_text())
            idle = re.search(r"^(?:total_)?inactive_file (\d+)$", (cgroup / stat).read_text(), re.MULTILINE)
            if total < machine.total:
                return used - int(idle[1] if idle else 0), total
    return machine.total - machine.available, machine.total


def gpu(device: torch.device) -> tuple[int, int, int] | None:
    """Used and total bytes of a GPU, and the most that this process's tensors took; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total, torch.cuda.max_memory_allocated(device)
