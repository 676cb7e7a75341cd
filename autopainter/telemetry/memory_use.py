"""How much memory there is, and how much of it is used, as the kernel and the GPU's driver see it."""

import psutil
import torch

from autopainter.cgroup import Groups


def resident() -> int:
    """Bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def host(groups: Groups) -> tuple[int, int]:
    """Used and total bytes: of the container if it has a limit, else of the machine."""
    machine = psutil.virtual_memory()
    limit, used = groups.memory_bytes(), groups.used_bytes()
    if limit is not None and used is not None and limit < machine.total:
        return used, limit
    return machine.total - machine.available, machine.total


def gpu(device: torch.device) -> tuple[int, int, int] | None:
    """Used and total bytes of a GPU, and the most that this process's tensors took; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total, torch.cuda.max_memory_allocated(device)
