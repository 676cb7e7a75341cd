"""Data parallelism: the gradients of a network in one flat buffer, summed over the workers in a fixed order.

torch's DistributedDataParallel regroups its buckets after the first step of each process, by the order in which
gradients happened to arrive, so with three or more workers the first step after a resume adds floats in another order
than the same step of an uninterrupted run. Here the layout is that of the parameters, always, so a resumed run is bit
for bit the same; and since the exchange is one call after the last microbatch, a worker that fails in its backward
pass never leaves the others inside half a collective.
"""

import enum
from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist


class GradientBuffer:
    """Gradients of some parameters, and a few scalars to average with them, as views of one flat float32 tensor.

    Attributes:
        parameters: the parameters, whose ``grad`` are views of the buffer from now on.
        scalars: float32 [count], free for values that shall be averaged over the workers too.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], scalars: int) -> None:
        self.parameters = list(parameters)
        sizes = [parameter.numel() for parameter in self.parameters]
        self._flat = torch.zeros(sum(sizes) + scalars, device=self.parameters[0].device)
        self.scalars = self._flat[sum(sizes) :]
        self.gradients = self._flat[: sum(sizes)]
        offset = 0
        for parameter, size in zip(self.parameters, sizes, strict=True):
            # The parameter's own strides: fused optimisers walk weight and gradient in memory order.
            parameter.grad = torch.as_strided(self._flat, parameter.size(), parameter.stride(), offset)
            offset += size

    def zero(self) -> None:
        """Begin a step."""
        self._flat.zero_()

    def average(self) -> None:
        """Replace gradients and scalars by their means over all workers (nothing to do in a single process)."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._flat)
            self._flat.div_(dist.get_world_size())


class Request(enum.IntEnum):
    """What a worker may ask of all workers: it travels with the gradients, so all hear of it after the same step."""

    STOP = 0
    """Save and end."""
    MEET = 1
    """Ask the host whether a machine is taken away."""
    SAVED = 2
    """Tell the host of a checkpoint."""
    MEMORY = 3
    """This worker had to step down the memory ladder."""


class Readback:
    """The values of each step on the host, where reading them never makes the GPU wait for its next step.

    On a GPU they are given out one step late, when the copy has long arrived; on a CPU at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._late = device.type == "cuda"
        self._pending: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, values: torch.Tensor) -> Iterator[tuple[int, list[float]]]:
        """Take a step's values, float32 [N] on the device; gives those that have arrived, with their step."""
        arrived = None
        if self._late:
            copy = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            values = copy
        self._pending.append((step, values, arrived))
        while len(self._pending) > int(self._late):
            step, values, arrived = self._pending.popleft()
            if arrived:
                arrived.synchronize()
            yield step, values.tolist()


def largest(number: int, device: torch.device) -> int:
    """The largest of all workers' numbers; every worker must call it."""
    if world() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def barrier() -> None:
    """Wait for all workers."""
    if world() > 1:
        dist.barrier()


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Give every worker worker 0's values, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def rank() -> int:
    """This process among the workers, 0 outside a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of workers, 1 outside a group."""
    return dist.get_world_size() if dist.is_initialized() else 1
