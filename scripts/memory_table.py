"""How much memory does a step take, for each setting of activation checkpointing and each microbatch?

On a GPU it is measured, and the largest microbatch is one that a step was done with in no more than so much memory.
Without one it is computed: a step is done with tensors that have shapes but no numbers, and what is alive at once is
added up: weights, optimisers, average, gradients, and what the backward passes need. A GPU takes more: its context,
the workspaces of its convolutions, and what its allocator cannot use. --reserve sets that aside.

    .venv/bin/python scripts/memory_table.py
"""

import argparse
import sys
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bench_step import random_batch, random_features
from measuring import bench_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autopainter.config import Config
from autopainter.trainer import Trainer

GIB = 1 << 30
CARDS = 6, 12, 24, 80, 141
RECOMPUTE: tuple[str, ...] = ("none", "outer", "all")
_SAMPLES = 1, 2, 4


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor))
        return out

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.bytes)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.bytes -= size


class _Shapes(Trainer):
    def _place(self, network: torch.nn.Module) -> None:
        """Tensors without numbers are everywhere, and their memory order takes no memory."""


def computed_bytes(config: Config) -> int:
    """The most that is alive in a step of a worker."""
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        trainer = _Shapes(config, torch.device("cpu"))
        alive.add(trainer.state().values())  # the optimisers' too
        batch = random_batch(config, 0)
        for step in range(2):
            alive.peak_bytes = alive.bytes
            trainer.step(step, batch)
    return alive.peak_bytes


def measured_bytes(config: Config) -> int:
    """The most that a GPU's allocator held in a step of a worker."""
    torch.cuda.empty_cache()
    trainer, batch = Trainer(config, torch.device("cuda")), random_batch(config, 0)
    for step in range(2):
        torch.cuda.reset_peak_memory_stats()
        trainer.step(step, batch)
    return torch.cuda.max_memory_allocated()


def fits(config: Config, limit_bytes: float) -> bool:
    """Whether a GPU does a step in so much memory."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit_bytes / total, 1.0))
    try:
        measured_bytes(config)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> int:
    """Compute or measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda measures; cpu computes.")
    parser.add_argument("--size", type=int, default=512, help="Edge of the images in pixels.")
    parser.add_argument("--reserve", type=float, default=1.0, help="GiB of a card that are not for tensors.")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="As in training.")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        print("memory_table: --device cuda: torch finds no GPU here", file=sys.stderr)
        return 2
    needed = measured_bytes if gpu else computed_bytes
    with tempfile.TemporaryDirectory() as folder:
        features = random_features(Path(folder), "relu2_2")

        def config(recompute: str, microbatch: int) -> Config:
            fields = {
                "data.image_size": options.size, "train.global_batch": microbatch,
                "train.activation_checkpointing": recompute, **features,
            }  # fmt: skip
            return bench_config(fields, options.set)

        print(f"{'measured on ' + torch.cuda.get_device_name() if gpu else 'computed'}; {options.size} px\n")
        heads = [f"{count} image{'s' * (count > 1)}, GiB" for count in _SAMPLES] + ["each more, GiB"]
        print(f"| recomputed | {' | '.join(heads)} | largest microbatch in {' / '.join(map(str, CARDS))} GiB |")
        print(f"| --- |{' ---: |' * len(heads)} --- |")
        for recompute in RECOMPUTE:
            peaks = [needed(config(recompute, count)) for count in _SAMPLES]
            more = (peaks[-1] - peaks[-2]) / (_SAMPLES[-1] - _SAMPLES[-2])
            base = peaks[-1] - more * _SAMPLES[-1]
            largest = []
            for card in CARDS:
                limit = (card - options.reserve) * GIB
                count = max(int((limit - base) / more), 0)
                while gpu and count and not fits(config(recompute, count), limit):
                    count = count * 19 // 20
                largest.append(count)
            sizes = [f"{peak / GIB:.2f}" for peak in peaks] + [f"{more / GIB:.2f}"]
            print(f"| {recompute} | {' | '.join(sizes)} | {' / '.join(map(str, largest))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
