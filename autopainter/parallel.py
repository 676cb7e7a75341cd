"""Data parallelism: the gradients of a network in one flat buffer, summed over the workers in a fixed order.

torch's DistributedDataParallel regroups its buckets after the first step of each process, by the order in which
gradients happened to arrive, so with three or more workers the first step after a resume adds floats in another order
than the same step of an uninterrupted run. Here the layout is that of the parameters, always, so a resumed run is bit
for bit the same; and since the exchange is one call after the last microbatch, a worker that fails in its backward
pass never leaves the others inside half a collective.
"""

from collections.abc import Iterable

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
