"""The exchange of gradients: three real processes over gloo, buckets in a fixed order, and a worker that begins again.

Run: pytest tests/test_parallel.py
"""

import datetime
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from autopainter.parallel import GradientBuffer

WORLD, SCALARS = 3, 2
FLOAT = 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


def inputs(rank):
    return torch.arange(20, dtype=torch.float32).view(4, 5) / 10 + rank


def expected():
    """Mean gradients of all workers, one network over all their inputs."""
    net = network()
    net(torch.cat([inputs(rank) for rank in range(WORLD)])).square().mean().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


class Failing(torch.autograd.Function):
    """Lets a backward pass fail at one place."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("out of memory")


def work(rank, folder, bucket_bytes, fails):
    """One worker: a step of two parts; a failing worker meets the end of its memory in the last backward pass."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    net = network()
    buffer = GradientBuffer(net.parameters(), SCALARS, bucket_bytes)
    events = []
    all_reduce = dist.all_reduce

    def recorded(tensor, *args, **kwargs):
        events.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = recorded
    result = {}
    for step in range(2):
        for attempt in range(2):
            buffer.zero()
            try:
                for number, part in enumerate(inputs(rank).chunk(2)):
                    hidden = net[:2](part)
                    if fails and rank == 1 and attempt == 0 and number == 1:
                        hidden = Failing.apply(hidden)
                    loss = net[2:](hidden).square().mean() / 2
                    buffer.backward(loss, last=number == 1)
                    buffer.scalars += torch.tensor([1.0, rank])
                break
            except torch.OutOfMemoryError:
                events.append("failed")
        events.append("backward done")
        buffer.average()
        result[step] = {name: parameter.grad.tolist() for name, parameter in net.named_parameters()}
        assert buffer.scalars.tolist() == [2.0, 2.0]  # two parts, and twice the mean rank
    Path(f"{folder}/{rank}.json").write_text(json.dumps({"events": events, "gradients": result}))
    dist.destroy_process_group()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 20 * FLOAT, 1 << 20])
def test_gradients_are_the_mean_of_all_workers(tmp_path, bucket_bytes, fails):
    torch.multiprocessing.start_processes(
        work, (str(tmp_path), bucket_bytes, fails), nprocs=WORLD, start_method="spawn"
    )
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    assert found[0]["gradients"] == found[1]["gradients"] == found[2]["gradients"]  # bit for bit
    assert found[0]["gradients"]["0"] == found[0]["gradients"]["1"]
    for name, gradient in expected().items():
        torch.testing.assert_close(torch.tensor(found[0]["gradients"]["0"][name]), gradient)

    sizes = {  # from the last parameter to the first one, with scalars and what aligns them (64 floats) at the end
        1: [1, 3, 3, 21, 7, 35 + 64],
        20 * FLOAT: [1 + 3 + 3 + 21, 7 + 35 + 64],
        1 << 20: [1 + 3 + 3 + 21 + 7 + 35 + 64],
    }[bucket_bytes]
    early = len([size for size in sizes if size < 64])
    plain = [*sizes[:early], "backward done", *sizes[early:]] * 2
    assert found[0]["events"] == found[2]["events"] == plain  # sent while the backward pass went on, in one order
    if not fails:
        assert found[1]["events"] == plain
        return
    before = {1: 4, 20 * FLOAT: 1, 1 << 20: 0}[bucket_bytes]  # what was complete above the place that fails
    once = [*sizes[:before], "failed", *sizes[before:early], "backward done", *sizes[early:]]
    assert found[1]["events"] == once * 2
