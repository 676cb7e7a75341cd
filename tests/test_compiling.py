"""torch.compile: the same bits wherever it compiles, and one line where it cannot. That it changes no step is tested in
test_trainer.py.

Run: pytest tests/test_compiling.py
"""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from waiting import PATIENCE_SECONDS

PROGRAM = """
import hashlib
import torch
from autopainter.compiling import compile_network
from autopainter.models.layers import initialise
from autopainter.models.unet import UNet

torch.set_num_threads(1)
network = UNet(levels=1, width=4, norm="group", dropout=0.5)
initialise(network, 0, 0)
compile_network(network)
image = torch.linspace(-1, 1, 2 * 5 * 16 * 16).sin().view(2, 5, 16, 16)
with torch.autocast("cpu", torch.bfloat16):
    painted = network(image, torch.arange(2))
painted.square().sum().backward()
tensors = [painted.detach(), *(parameter.grad for parameter in network.parameters())]
print(hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest())
counted = torch._dynamo.utils.counters["aot_autograd"]
print(counted["autograd_cache_hit"], counted["autograd_cache_miss"])
"""


def start(cache):
    """A process that compiles a network, or finds it compiled in a folder; it prints a hash of what comes out."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], text=True, stdout=subprocess.PIPE,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )  # fmt: skip


def test_every_process_gets_the_same_bits_whether_it_compiles_or_finds_it_done(tmp_path):
    running = [start(tmp_path / name) for name in "ab"]
    (first, hits), (second, _) = (process.communicate(timeout=PATIENCE_SECONDS)[0].splitlines() for process in running)
    assert first == second
    assert len(first) == 64
    assert hits == "0 1"
    assert all(any((tmp_path / name).rglob("*.so")) for name in "ab")  # each has compiled
    assert start(tmp_path / "a").communicate(timeout=PATIENCE_SECONDS)[0].splitlines() == [first, "1 0"]


def test_without_a_compiler_there_is_one_line(small_settings, tmp_path):
    program = Path(sys.executable).parent / "autopainter"
    settings = [part for text in (*small_settings, "train.compile=true") for part in ("--set", text)]
    done = subprocess.run(
        [program, "train", "--config", ROOT / "job/configs/quickstart.yaml", *settings],
        text=True, capture_output=True, timeout=PATIENCE_SECONDS,
        env=os.environ | {"PATH": str(program.parent), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("autopainter: train.compile: nothing can be compiled here")
    assert "g++" in done.stderr
