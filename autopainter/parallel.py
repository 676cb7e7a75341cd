"""Data parallelism: the gradients of a network in one flat buffer, summed over the workers while they still arrive.

torch's DistributedDataParallel regroups its buckets after the first step of each process, by the order in which
gradients happened to arrive, so with three or more workers the first step after a resume adds floats in another order
than the same step of an uninterrupted run. Here the buckets are those that the order of the parameters gives, always,
and are sent in their order, so a resumed run is bit for bit the same. A worker whose backward pass fails may begin the
step again: it computes what it had not sent yet, and the others wait for no more than that.
"""

import enum
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

_BUCKET_BYTES = 4 << 20
_ALIGNMENT = 64  # floats: the gradients begin where vector loads may


@dataclass(frozen=True)
class _Bucket:
    """What is sent at once.

    Attributes:
        start, stop: its place in the flat tensor.
        first, end: its parameters' place in the list of all.
    """

    start: int
    stop: int
    first: int
    end: int


class GradientBuffer:
    """Gradients of some parameters, and a few scalars to average with them, as views of one flat float32 tensor.

    The tensor is sent from its end: where the parameters are in the order of the forward pass, that is the order in
    which their gradients arrive. The scalars are sent last.

    Args:
        parameters: those of one network, in the order in which its forward pass uses them.
        scalars: number of scalars.
        bucket_bytes: least size of what is sent at once.

    Attributes:
        parameters: the parameters, whose ``grad`` are views of the buffer from now on.
        scalars: float32 [count], free for values that shall be averaged over the workers too.
        gradients: float32, the gradients one behind the other.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], scalars: int, bucket_bytes: int = _BUCKET_BYTES
    ) -> None:
        self.parameters = list(parameters)
        ends = [-(-scalars // _ALIGNMENT) * _ALIGNMENT]
        for parameter in self.parameters:
            ends.append(ends[-1] + parameter.numel())
        self._flat = torch.zeros(ends[-1], device=self.parameters[0].device)
        self.scalars = self._flat[:scalars]
        self.gradients = self._flat[ends[0] :]
        for parameter, offset in zip(self.parameters, ends, strict=False):
            # The parameter's own strides: fused optimisers walk weight and gradient in memory order.
            parameter.grad = torch.as_strided(self._flat, parameter.size(), parameter.stride(), offset)
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self._buckets: list[_Bucket] = []  # in the order in which they are sent
        self._bucket_of: dict[torch.nn.Parameter, int] = {}
        end = len(self.parameters)
        for first in reversed(range(end)):
            start = ends[first] if first else 0  # the last one has the scalars too
            if first == 0 or (ends[end] - start) * self._flat.itemsize >= bucket_bytes:
                self._bucket_of |= dict.fromkeys(self.parameters[first:end], len(self._buckets))
                self._buckets.append(_Bucket(start, ends[end], first, end))
                end = first
        self._missing: list[int] | None = None  # gradients that a bucket waits for, in the last backward pass
        self._sent: list[dist.Work] = []

    def zero(self) -> None:
        """Begin a step, or begin it again: what is sent stays."""
        self._flat[: self._next.stop].zero_()

    def backward(self, of: torch.Tensor, gradient: torch.Tensor | None = None, *, last: bool) -> None:
        """Add the gradients of a tensor, but for those that are sent; in a step's last pass, send what is complete.

        Args:
            of, gradient: as ``torch.autograd.backward`` takes them, of one shape and dtype.
            last: whether it is the step's last backward pass.
        """
        if last and world() > 1:
            self._missing = [bucket.end - bucket.first for bucket in self._buckets]
        if gradient is not None:
            # The same bits; from anything but a number, PyTorch's first backward pass imports SymPy, 1 s of a core.
            of = (of * gradient).sum()
        try:
            of.backward(inputs=self.parameters[: self._next.end])
        finally:
            self._missing = None

    def average(self) -> None:
        """Replace gradients and scalars by their means over all workers (nothing to do in a single process)."""
        if world() == 1:
            return
        while len(self._sent) < len(self._buckets):
            self._send()
        for work in self._sent:
            work.wait()
        self._sent.clear()
        self._flat.div_(world())

    @property
    def _next(self) -> _Bucket:
        """The first bucket that is not sent; there is one, as only ``average`` sends the last."""
        return self._buckets[len(self._sent)]

    def _arrived(self, parameter: torch.nn.Parameter) -> None:
        if self._missing is None:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        # In their order, whatever came first; the last one, which has the scalars, waits for ``average``.
        while len(self._sent) + 1 < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        work = dist.all_reduce(self._flat[self._next.start : self._next.stop], async_op=True)
        assert work is not None
        self._sent.append(work)


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
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def rank() -> int:
    """This process among the workers, 0 outside a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of workers, 1 outside a group."""
    return dist.get_world_size() if dist.is_initialized() else 1
