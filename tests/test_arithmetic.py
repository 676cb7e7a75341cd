"""How many threads a process computes with, and which GPUs it refuses. Run: pytest tests/test_arithmetic.py"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autopainter import arithmetic
from autopainter.cgroup import Groups
from autopainter.config import load
from autopainter.errors import UserError

PROGRAM = """
import os, sys, torch
from autopainter import arithmetic
from autopainter.config import load
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
arithmetic.prepare(load(None, sys.argv[2:]), torch.device("cpu"))
print(torch.get_num_threads())
"""
HERE = Groups().usable_cores()


@pytest.mark.parametrize(
    ("bound", "workers", "settings", "threads"),
    [
        ("all", 1, [], HERE),
        ("all", 2, [], max(HERE // 2, 1)),
        ("one", 1, [], 1),
        ("one", 2, [], 1),
        ("one", 1, ["train.threads=3"], 3),
    ],
)
def test_threads_are_a_share_of_the_usable_cores(
    tmp_path: Path, bound: str, workers: int, settings: list[str], threads: int
) -> None:
    env = {**os.environ, "LOCAL_WORLD_SIZE": str(workers)}
    config = [f"run.storage={tmp_path}", "run.name=a", "data.manifest=none", "loss.feature_weight=0",
              "train.precision=float32", "train.steps=1"]  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, bound, *config, *settings]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == f"{threads}\n", done.stderr


@pytest.mark.parametrize(
    ("capability", "precision", "refused"),
    [((7, 5), "bfloat16", True), ((7, 5), "float32", False), ((8, 0), "bfloat16", False), ((12, 0), "bfloat16", False)],
)
def test_a_gpu_without_bfloat16_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    fields = ["run.storage=s", "run.name=a", "data.manifest=none", "loss.feature_weight=0", "train.steps=1"]
    config = load(None, [*fields, f"train.precision={precision}"], {})
    if refused:
        with pytest.raises(UserError, match=r"train.precision: bfloat16, but Tesla T4 .* set train.precision=float32"):
            arithmetic.prepare(config, torch.device("cuda", 0))
    else:
        arithmetic.prepare(config, torch.device("cuda", 0))
