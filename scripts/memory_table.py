"""How much memory does a step take, for each setting of activation checkpointing and each microbatch?

Computed, on any machine: a step is done with tensors that have shapes but no numbers, and what is alive at once is
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autopainter import config as configuration
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


def peak_bytes(config: Config) -> int:
    """The most that is alive in a step of a worker."""
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        trainer = _Shapes(config, torch.device("cpu"))
        alive.add(trainer.state().values())  # the optimisers' too
        batch = random_batch(config, 0)
        for step in range(2):
            alive.peak_bytes = alive.bytes
            trainer.step(step, batch)
    return alive.peak_bytes


def main() -> int:
    """Compute, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="Edge of the images in pixels.")
    parser.add_argument("--reserve", type=float, default=1.0, help="GiB of a card that are not for tensors.")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="As in training.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        features = random_features(Path(folder), "relu2_2")

        def needed(recompute: str, microbatch: int) -> int:
            fields = {
                "run.name": "memory", "run.storage": "unused", "data.manifest": "unused", "train.steps": 2,
                "data.image_size": options.size, "train.global_batch": microbatch,
                "train.activation_checkpointing": recompute, **features,
            }  # fmt: skip
            settings = [*(f"{name}={value}" for name, value in fields.items()), *options.set]
            return peak_bytes(configuration.load(None, settings, environment={}))

        found = {recompute: [needed(recompute, count) for count in _SAMPLES] for recompute in RECOMPUTE}
    heads = [f"{count} image{'s' * (count > 1)}, GiB" for count in _SAMPLES] + ["each more, GiB"]
    print(f"| recomputed | {' | '.join(heads)} | largest microbatch in {' / '.join(map(str, CARDS))} GiB |")
    print(f"| --- |{' ---: |' * len(heads)} --- |")
    for recompute, peaks in found.items():
        more = (peaks[-1] - peaks[-2]) / (_SAMPLES[-1] - _SAMPLES[-2])
        base = peaks[-1] - more * _SAMPLES[-1]
        largest = [max(int(((card - options.reserve) * GIB - base) / more), 0) for card in CARDS]
        row = [recompute, *(f"{peak / GIB:.2f}" for peak in peaks), f"{more / GIB:.2f}", " / ".join(map(str, largest))]
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
