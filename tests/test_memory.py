"""Memory that runs out: the allocator's error at chosen places of a step, in one process and in some of several.

Reference: the same steps with memory enough. The error is torch's own, raised where a GPU's allocator would raise it.
Run: pytest tests/test_memory.py (with a GPU at hand, the last tests fill it up)
"""

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import pytest
import torch
from conftest import ROOT
from processes import free_ports
from waiting import PATIENCE_SECONDS

from autopainter import checkpoint, config, journal, loop, losses, memory, storage, trainer
from autopainter.cgroup import Groups
from autopainter.config import Config
from autopainter.memory import GpuLadder, Rung
from autopainter.storage import LocalStore

CPU = torch.device("cpu")
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


def configure(small_settings: list[str], place: Path | str, *changes: str) -> Config:
    settings = [*small_settings, f"run.storage={place}", "train.steps=6", *changes]
    return config.load(None, settings, environment={})


def final(settings: Config) -> checkpoint.Tensors:
    found = checkpoint.newest(storage.open_store(settings.run.uri))
    assert found is not None
    assert found[0].step == settings.train.steps
    return found[1]


def assert_close(one: checkpoint.Tensors, other: checkpoint.Tensors) -> None:
    """Equal but for the order of float additions."""
    for name in (name for name in other if name.startswith("average.")):
        assert torch.allclose(one[name], other[name], atol=2e-5), name


# The ladder


def test_the_ladder_gives_up_recomputation_first_and_then_the_microbatch(small: Config) -> None:
    assert memory.rungs(small, 2) == [
        Rung("none", 4), Rung("outer", 4), Rung("all", 4), Rung("all", 2), Rung("all", 1),
    ]  # fmt: skip
    lower = small.train.model_copy(update={"microbatch": 3, "activation_checkpointing": "all"})
    assert memory.rungs(small.model_copy(update={"train": lower}), 2) == [Rung("all", 3), Rung("all", 1)]


def test_batch_norm_has_no_ladder(small: Config) -> None:
    coupled = small.model_copy(update={"model": small.model.model_copy(update={"norm": "batch"})})
    assert memory.rungs(coupled, 1) == [Rung("none", 8)]


def test_a_rung_is_remembered_for_the_same_machine_and_knobs(small: Config, store: storage.Store) -> None:
    ladder = GpuLadder(store, small, 2, CPU)
    assert ladder.step_down(3, MESSAGE)
    assert ladder.step_down(3, MESSAGE)
    assert GpuLadder(store, small, 2, CPU).rung == ladder.rung == Rung("all", 4)
    assert GpuLadder(store, small, 1, CPU).rung == Rung("none", 8)
    turned = small.model_copy(update={"train": small.train.model_copy(update={"microbatch": 2})})
    assert GpuLadder(store, turned, 2, CPU).rung == Rung("none", 2)
    assert [entry.kind for entry in journal.read(store)] == ["gpu memory"] * 2


def test_at_the_bottom_there_is_no_further_step(small: Config, folder: LocalStore) -> None:
    ladder = GpuLadder(folder, small, 8, CPU)
    assert [ladder.step_down(1, MESSAGE) for _ in range(3)] == [True, True, False]
    assert ladder.rung == Rung("all", 1)


def test_a_damaged_record_costs_only_itself(small: Config, folder: LocalStore) -> None:
    GpuLadder(folder, small, 1, CPU).step_down(1, MESSAGE)
    folder.write("memory/0001.json", b"{")
    assert GpuLadder(folder, small, 1, CPU).rung == Rung("none", 8)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError(MESSAGE), "gpu"),
        (RuntimeError("CUDA error: out of memory"), "gpu"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "gpu"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "gpu"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "gpu"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "gpu"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), "gpu"),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), "gpu"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), None),
        (MemoryError(), "host"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "host"),
        (cv2.error("OpenCV(5.0.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes"), "host"),
        (cv2.error("OpenCV(5.0.0) resize.cpp:1: error: (-215:Assertion failed) !ssize.empty()"), None),
        (RuntimeError("shape mismatch"), None),
        (ValueError("out of memory"), None),
    ],
)  # fmt: skip
def test_which_memory_an_error_speaks_of(error: BaseException, kind: str | None) -> None:
    assert memory.ran_out(error) == kind


# In a step


class Allocator:
    """Raises the allocator's error at chosen calls of a function, or while its gradient is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, calls: set[int], where: str) -> None:
        self.count = 0
        self.failed = 0
        original: Callable[..., torch.Tensor] = getattr(owner, name)

        def function(*arguments: torch.Tensor, **options: object) -> torch.Tensor:
            number, self.count = self.count, self.count + 1
            if number not in calls:
                return original(*arguments, **options)
            if where == "forward":
                self._fail()
            result = original(*arguments, **options)
            result.register_hook(lambda _: self._fail())
            return result

        monkeypatch.setattr(owner, name, function)

    def _fail(self) -> None:
        self.failed += 1
        raise torch.OutOfMemoryError(MESSAGE)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("phase", ["discriminator", "generator_adversarial"])
def test_a_step_without_memory_enough_is_done_again_with_less(
    small_settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    phase: str,
    where: str,
) -> None:
    reference = configure(small_settings, tmp_path / "reference")
    loop.train(reference, CPU)
    settings = configure(small_settings, tmp_path / "run")
    allocator = Allocator(monkeypatch, losses, phase, {2, 3, 4}, where)  # thrice in the third step
    loop.train(settings, CPU)
    assert allocator.failed == 3
    warnings = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert warnings == [
        f"GPU out of memory at step 2: activation checkpointing none -> outer ({MESSAGE})",
        f"GPU out of memory at step 2: activation checkpointing outer -> all ({MESSAGE})",
        f"GPU out of memory at step 2: microbatch 8 -> 4 ({MESSAGE})",
    ]
    assert_close(final(settings), final(reference))
    run = storage.open_store(settings.run.uri)
    assert journal.counts(run) == {"gpu memory": 3}
    assert GpuLadder(run, settings, 1, CPU).rung == Rung("all", 4)


def test_what_only_recomputes_changes_no_bit(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = configure(small_settings, tmp_path / "reference")
    loop.train(reference, CPU)
    settings = configure(small_settings, tmp_path / "run")
    Allocator(monkeypatch, losses, "generator_adversarial", {2}, "backward")
    loop.train(settings, CPU)
    mine, expected = final(settings), final(reference)
    assert [name for name in expected if not torch.equal(mine[name], expected[name])] == []


def test_a_failed_attempt_leaves_nothing_behind(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that are alive when the step is tried again are those that were alive when it began."""
    alive: list[int] = []
    free = memory.free

    def tensors() -> int:
        gc.collect()
        found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        return sum(tensor.grad_fn is not None and not isinstance(tensor, torch.nn.Parameter) for tensor in found)

    def look() -> None:
        free()
        alive.append(tensors())

    monkeypatch.setattr(memory, "free", look)
    Allocator(monkeypatch, losses, "generator_adversarial", {1, 2, 3}, "backward")
    loop.train(configure(small_settings, tmp_path), CPU)
    assert alive == [0, 0, 0]  # no tensor of any graph


def test_a_gpu_too_small_for_one_image_fails_and_says_so(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Allocator(monkeypatch, losses, "discriminator", set(range(100)), "forward")
    with pytest.raises(torch.OutOfMemoryError, match=r"too small even with .*'all', microbatch=1"):
        loop.train(configure(small_settings, tmp_path), CPU)


def test_painting_the_validation_samples_steps_down_too(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    convert = trainer.to_pixels

    def measured(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError(MESSAGE)
        return convert(images)

    monkeypatch.setattr(trainer, "to_pixels", measured)
    settings = configure(small_settings, tmp_path, "train.global_batch=4", "telemetry.image_every_steps=3")
    loop.train(settings, CPU)
    final(settings)
    assert sizes[:4] == [4, 4, 4, 2]  # recomputing does not help painting
    assert set(sizes[3:]) == {2}


# In some of several workers

WORKER = """
import os, sys, torch
import torch.distributed as dist
from autopainter import config, loop, losses

rank, failing = int(os.environ["RANK"]), eval(sys.argv[1])
counts = {"discriminator": 0, "generator_adversarial": 0}

def patch(name):
    original = getattr(losses, name)
    def function(*arguments):
        counts[name] += 1
        fails = (rank, name, counts[name]) in failing
        result = original(*arguments)
        def fail(_): raise torch.OutOfMemoryError("CUDA out of memory.")
        if fails:
            result.register_hook(fail)
        return result
    setattr(losses, name, function)

for name in counts:
    patch(name)
dist.init_process_group("gloo")
import logging
logging.basicConfig(level=logging.INFO, format=f"rank {rank}: %(message)s", stream=sys.stderr)
loop.train(config.load(None, sys.argv[2:], environment={}), torch.device("cpu"))
"""


def group(settings: list[str], failing: set[tuple[int, str, int]]) -> str:
    """Train with two processes of which some fail; their output."""
    (port,) = free_ports(1)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, repr(failing), *settings],
            cwd=ROOT, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    output = "".join(program.communicate(timeout=PATIENCE_SECONDS)[1] for program in programs)
    assert [program.returncode for program in programs] == [0, 0], output
    return output


@pytest.mark.parametrize(
    "failing",
    [
        {(1, "discriminator", 3)},
        {(0, "generator_adversarial", 3), (1, "generator_adversarial", 3)},
        {(0, "discriminator", 2), (1, "generator_adversarial", 4)},
    ],
    ids=["one worker", "both at once", "one after the other"],
)
def test_workers_agree_on_the_rung(
    small_settings: list[str], tmp_path: Path, failing: set[tuple[int, str, int]]
) -> None:
    settings = [*small_settings, "train.steps=6"]
    group([*settings, f"run.storage={tmp_path}/reference"], set())
    output = group([*settings, f"run.storage={tmp_path}/run"], failing)
    assert "GPU out of memory at step" in output
    run, reference = (configure(small_settings, tmp_path / name) for name in ("run", "reference"))
    mine, expected = final(run), final(reference)
    assert [name for name in expected if not torch.equal(mine[name], expected[name])] == []  # only recomputed
    steps_down = 1 if len({call for _, *call in map(tuple, failing) for call in call[1:]}) == 1 else 2
    assert GpuLadder(storage.open_store(run.run.uri), run, 2, CPU).depth == steps_down


# The host


def test_the_host_ladder_halves_what_is_ahead(small: Config, folder: LocalStore) -> None:
    data = small.data.model_copy(
        update={"prefetch_batches": 8, "fetch_ahead_batches": 4, "fetch_threads": 8, "decode_threads": 2}
    )
    wide = small.model_copy(update={"data": data})
    seen = []
    for _ in range(9):
        now = memory.within_host(folder, wide, 2).data
        seen.append((now.prefetch_batches, now.fetch_ahead_batches, now.fetch_threads, now.decode_threads))
        memory.note_host(folder, wide, 2, "the test says so")
    assert seen[:5] == [(8, 4, 8, 2), (4, 2, 4, 1), (2, 1, 2, 1), (1, 0, 1, 1), (1, 0, 1, 1)]
    assert len(folder.list("memory/")) == 6
    assert memory.within_host(folder, small, 2) == small  # other knobs: from the top again


def test_a_cache_in_memory_is_given_up(small: Config, folder: LocalStore, tmp_path: Path) -> None:
    for place, kept in (("/dev/shm/cache", False), (str(tmp_path), True)):
        cached = small.model_copy(update={"data": small.data.model_copy(update={"cache": place})})
        memory.note_host(folder, cached, 1, "the test says so")
        assert (memory.within_host(folder, cached, 1).data.cache is not None) == kept


def test_the_order_does_not_depend_on_the_host_ladder(small_settings: list[str], tmp_path: Path) -> None:
    reference, settings = (configure(small_settings, tmp_path / name) for name in ("reference", "run"))
    loop.train(reference, CPU)
    memory.note_host(storage.open_store(settings.run.uri), settings, 1, "the test says so")
    loop.train(settings, CPU)
    mine, expected = final(settings), final(reference)
    assert [name for name in expected if not torch.equal(mine[name], expected[name])] == []


@pytest.mark.parametrize("layout", ["memory.events", "memory/memory.oom_control"])
def test_a_kill_by_the_kernel_is_noticed_once(
    small: Config, folder: LocalStore, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    counter = tmp_path / layout
    counter.parent.mkdir(exist_ok=True)
    (tmp_path / "own").write_text("1:memory:/\n0::/\n")

    def look(kills: int) -> int:
        counter.write_text(f"oom 7\noom_kill {kills}\n")
        memory.note_kernel_kills(folder, small, 2, Groups(tmp_path, tmp_path / "own"))
        return len(folder.list("memory/"))

    assert [look(kills) for kills in (3, 3, 4, 4, 0, 1)] == [0, 0, 1, 1, 1, 2]
    assert list(tmp_path.glob("autopainter-*"))
    memory.forget_kernel_kills(folder)
    memory.forget_kernel_kills(folder)  # a second worker of the machine
    assert not list(tmp_path.glob("autopainter-*"))


def test_memory_that_the_host_refuses_is_remembered(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> torch.Tensor:
        return torch.empty(1 << 60)  # the real allocator's answer

    monkeypatch.setattr(losses, "total_variation", refuse)
    settings = configure(small_settings, tmp_path)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        loop.train(settings, CPU)
    assert journal.counts(storage.open_store(settings.run.uri)) == {"host memory": 1}


# A real GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def small_gpu() -> Iterator[torch.device]:
    """A GPU of which this process may use 1 GiB."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((1 << 30) / total)
    yield torch.device("cuda", 0)
    torch.cuda.set_per_process_memory_fraction(1.0)


@needs_gpu
def test_a_batch_too_large_for_the_gpu_ends_in_a_finished_run(
    small_settings: list[str], tmp_path: Path, small_gpu: torch.device
) -> None:
    changes = ("data.image_size=256", "model.generator_width=64", "train.global_batch=64")
    settings = configure(small_settings, tmp_path, *changes)
    loop.train(settings, small_gpu)
    final(settings)
    assert journal.counts(storage.open_store(settings.run.uri))["gpu memory"] > 0
