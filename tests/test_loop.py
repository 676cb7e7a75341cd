"""A run in one process, from preflight to its end: killed, damaged, diverged, finished, refused.

Reference: an undisturbed run of the same configuration. Run: pytest tests/test_loop.py
"""

import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from driving import assert_same_state
from waiting import PATIENCE_SECONDS

from autopainter import checkpoint, config, loop, losses, storage
from autopainter.config import Config
from autopainter.errors import Diverged, UserError

CPU = torch.device("cpu")


def settings_of(small_settings: list[str], place: Path, *changes: str) -> list[str]:
    return [*small_settings, f"run.storage={place}", *changes]


def configure(small_settings: list[str], place: Path, *changes: str) -> Config:
    return config.load(None, settings_of(small_settings, place, *changes), environment={})


def newest(settings: Config) -> tuple[int, checkpoint.Tensors]:
    found = checkpoint.newest(storage.open_store(settings.run.uri))
    assert found is not None
    return found[0].step, found[1]


@pytest.fixture
def undisturbed(small_settings: list[str], tmp_path: Path) -> checkpoint.Tensors:
    settings = configure(small_settings, tmp_path / "undisturbed")
    assert loop.train(settings, CPU).start == 0
    return newest(settings)[1]


KILLED_WITHIN_A_STEP = """
import os, signal, sys
import torch
from autopainter import config, loop, losses

original, calls = losses.total_variation, 0

def total_variation(painted):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(painted)

losses.total_variation = total_variation
torch.set_num_threads(1)
loop.train(config.load(sys.argv[1], environment={}), torch.device("cpu"))
"""


def test_a_run_killed_at_any_step_ends_in_the_same_state(
    small_settings: list[str], tmp_path: Path, undisturbed: checkpoint.Tensors
) -> None:
    settings = configure(small_settings, tmp_path / "killed")
    (tmp_path / "run.yaml").write_text(settings.to_yaml())
    step = random.randint(5, 11)
    command = [sys.executable, "-c", KILLED_WITHIN_A_STEP, str(tmp_path / "run.yaml"), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == -signal.SIGKILL, done.stderr
    start = loop.train(settings, CPU).start
    assert 0 < start < step
    assert_same_state(newest(settings)[1], undisturbed)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(
    small_settings: list[str], tmp_path: Path, undisturbed: checkpoint.Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    loop.train(configure(small_settings, tmp_path / "run", "train.steps=7"), CPU)
    run = tmp_path / "run" / "small"
    state = next(run.glob("checkpoints/00000007/*/state.safetensors"))
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    settings = configure(small_settings, tmp_path / "run")
    loop.preflight(settings, 1, "the number of workers")
    assert loop.train(settings, CPU).start == 6
    assert "checkpoint of step 7 is damaged and is passed over" in caplog.text
    assert_same_state(newest(settings)[1], undisturbed)


def test_a_finished_run_is_left_alone(small_settings: list[str], tmp_path: Path) -> None:
    settings = configure(small_settings, tmp_path, "train.steps=3")
    assert loop.train(settings, CPU).start == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert loop.train(settings, CPU).start == 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.fixture
def spoilt_fifth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the fifth step is infinite while all its losses are still finite."""
    steps_done = iter(range(100))
    total_variation = losses.total_variation

    def spoilt(painted: torch.Tensor) -> torch.Tensor:
        if next(steps_done) == 4:
            painted.register_hook(lambda gradient: gradient + float("inf"))
        return total_variation(painted)

    monkeypatch.setattr(losses, "total_variation", spoilt)


@pytest.mark.usefixtures("spoilt_fifth_step")
def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(small_settings: list[str], tmp_path: Path) -> None:
    settings = configure(small_settings, tmp_path)
    with pytest.raises(Diverged, match=r"step 5: generator/gradient_norm not finite"):
        loop.train(settings, CPU)
    step, state = newest(settings)
    assert step == 4
    assert all(tensor.isfinite().all() for tensor in state.values())
    of_this_run = f"*{tmp_path.parent.name}-{tmp_path.name}*".replace("_", "-")
    assert not list(Path(tempfile.gettempdir()).glob(f"autopainter-memory-{of_this_run}"))


@pytest.mark.usefixtures("spoilt_fifth_step")
def test_a_diverged_step_is_seen_though_it_is_neither_saved_nor_logged(
    small_settings: list[str], tmp_path: Path
) -> None:
    rarely = ("checkpoint.every_seconds=1000", "checkpoint.max_age_seconds=2000", "telemetry.log_every_steps=1000")
    with pytest.raises(Diverged, match=r"step 5: generator/gradient_norm not finite"):
        loop.train(configure(small_settings, tmp_path, *rarely), CPU)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.seed=1", "train.seed: the run .* was begun with 0, now it is 1"),
        ("data.image_size=64", "data.image_size: .* begun with 32, now it is 64"),
        ("data.lanes=16", "data.lanes: .* begun with None, now it is 16"),
    ],
)
def test_what_decides_the_result_may_not_change(
    small_settings: list[str], tmp_path: Path, change: str, said: str
) -> None:
    loop.train(configure(small_settings, tmp_path, "train.steps=1"), CPU)
    changed = configure(small_settings, tmp_path, change)
    for attempt in (lambda: loop.preflight(changed, 1, "workers"), lambda: loop.train(changed, CPU)):
        with pytest.raises(UserError, match=said):
            attempt()


def test_what_only_decides_how_it_is_computed_may_change(
    small_settings: list[str], tmp_path: Path, undisturbed: checkpoint.Tensors
) -> None:
    """Microbatches and recomputation change the order of float additions and nothing else."""
    loop.train(configure(small_settings, tmp_path / "run", "train.steps=5"), CPU)
    changes = ("train.microbatch=4", "train.activation_checkpointing=all", "data.decode_threads=1", "train.steps=8")
    settings = configure(small_settings, tmp_path / "run", *changes)
    assert loop.train(settings, CPU).start == 5
    reference = configure(small_settings, tmp_path / "reference", "train.steps=8")
    loop.train(reference, CPU)
    mine, expected = newest(settings)[1], newest(reference)[1]
    for name in (name for name in expected if name.startswith("average.")):
        assert torch.allclose(mine[name], expected[name], atol=2e-5), name


def test_a_shard_of_another_size_is_found_before_anything_starts(
    small_settings: list[str], tmp_path: Path, dataset: str
) -> None:
    data, copy = storage.open_store(dataset.rpartition("/")[0]), storage.open_store(str(tmp_path / "copy"))
    for entry in data.list():
        copy.write(entry.key, data.read(entry.key) + (b"more" if entry.key == "train-00000.tar" else b""))
    settings = configure(small_settings, tmp_path / "run", f"data.manifest={copy.locate('manifest.json')}")
    with pytest.raises(UserError, match=r"train-00000\.tar is not the shard that the manifest describes"):
        loop.preflight(settings, 1, "workers")
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_found_before_anything_starts(
    small_settings: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        loop.preflight(configure(small_settings, tmp_path / "file"), 1, "workers")
