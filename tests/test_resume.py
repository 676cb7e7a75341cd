"""Where a run begins and how it ends early: new, overwritten, with another run's weights, stopped, out of storage.

Run: pytest tests/test_resume.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from driving import assert_same_state
from processes import free_ports
from waiting import PATIENCE_SECONDS

from autopainter import checkpoint, config, journal, loop, resume, storage
from autopainter.config import Config
from autopainter.errors import CheckpointTooOld, Superseded, UserError
from autopainter.host import Host
from autopainter.storage import Store

CPU = torch.device("cpu")


def configure(small_settings: list[str], place: Path, *changes: str) -> Config:
    settings = [*small_settings, "train.steps=6", f"run.storage={place}", *changes]
    return config.load(None, settings, environment={})


def newest(settings: Config) -> tuple[int, checkpoint.Tensors]:
    found = checkpoint.newest(storage.open_store(settings.run.uri))
    assert found is not None
    return found[0].step, found[1]


def run_of(settings: Config) -> Store:
    return storage.open_store(settings.run.uri)


def only(prefix: str, tensors: checkpoint.Tensors) -> checkpoint.Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# New runs


def test_a_run_that_exists_is_not_touched(small_settings: list[str], tmp_path: Path) -> None:
    settings = configure(small_settings, tmp_path, "train.steps=2")
    resume.claim(settings, "none", overwrite=False)  # there is none yet
    loop.train(settings, CPU)
    before = {entry.key for entry in run_of(settings).list()}
    with pytest.raises(UserError, match=r"--resume none: the run .* exists, its newest checkpoint is of step 2"):
        resume.claim(settings, "none", overwrite=False)
    resume.claim(settings, "auto", overwrite=False)
    assert {entry.key for entry in run_of(settings).list()} == before


def test_a_run_can_be_overwritten_and_an_old_start_of_it_cannot_come_back(
    small_settings: list[str], tmp_path: Path
) -> None:
    settings = configure(small_settings, tmp_path, "train.steps=2")
    loop.train(settings, CPU)
    run = run_of(settings)
    run.write("notes.txt", b"not the run's own")
    old = checkpoint.CheckpointWriter(run, checkpoint.latest_attempt(run), checkpoint.Retention(3), {})
    resume.claim(settings, "none", overwrite=True)
    assert [entry.key for entry in run.list() if not entry.key.startswith("attempts/")] == ["notes.txt"]
    old.save(9, {"average.x": torch.zeros(1)})
    old.wait()
    assert isinstance(old.error, Superseded)
    changed = configure(small_settings, tmp_path, "train.seed=1", "train.steps=2")
    assert loop.train(changed, CPU).start == 0


def test_nothing_is_overwritten_for_a_run_that_cannot_begin(small_settings: list[str], tmp_path: Path) -> None:
    loop.train(configure(small_settings, tmp_path, "train.steps=1"), CPU)
    wrong = configure(small_settings, tmp_path, f"data.manifest={tmp_path}/nothing.json")
    with pytest.raises(UserError, match=r"nothing\.json"):
        loop.preflight(wrong, 1, "workers", "none", overwrite=True)
    assert newest(wrong)[0] == 1


def test_overwrite_alone_is_refused(small_settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--overwrite: only with --resume none"):
        resume.claim(configure(small_settings, tmp_path), "auto", overwrite=True)


# Another run's weights


@pytest.fixture
def source(small_settings: list[str], tmp_path: Path) -> Config:
    """A finished run of six steps, of which the last three are saved."""
    settings = configure(small_settings, tmp_path / "source")
    loop.train(settings, CPU)
    return settings


def test_a_run_begins_with_the_weights_of_another(small_settings: list[str], tmp_path: Path, source: Config) -> None:
    settings = configure(small_settings, tmp_path, f"train.init_from={source.run.uri}@5", "train.seed=3")
    loop.preflight(settings, 1, "workers")
    host = Host()
    host.stop()
    assert loop.train(settings, CPU, host).done == 1
    store = run_of(source)
    theirs = checkpoint.load_state(store, checkpoint.read(store, 5))
    mine = checkpoint.load_state(run_of(settings), checkpoint.read(run_of(settings), 0))
    assert only("generator.", theirs)
    for network in ("generator.", "discriminator.", "average."):
        assert_same_state(only(network, mine), only(network, theirs))
    assert not any(tensor.any() for tensor in only("optimizer.", mine).values())


def test_a_run_that_began_with_another_does_not_need_it_any_more(
    small_settings: list[str], tmp_path: Path, source: Config
) -> None:
    options = (f"train.init_from={source.run.uri}", "train.steps=4")
    reference, settings = (configure(small_settings, tmp_path / name, *options) for name in ("reference", "run"))
    loop.train(reference, CPU)
    host = Host()
    host.stop()
    loop.train(settings, CPU, host)
    store = run_of(source)
    store.delete(entry.key for entry in store.list())
    loop.preflight(settings, 1, "workers")
    assert loop.train(settings, CPU).start == 1
    assert_same_state(newest(settings)[1], newest(reference)[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["train.init_from={uri}@4711"], r"train.init_from: .*no checkpoint of step 4711; saved steps: \[4, 5, 6\]"),
        (["train.init_from={uri}-other"], r"train.init_from: .*-other: there is no checkpoint"),
        (["train.init_from={uri}", "model.generator_width=16"], r"model.generator_width 8, now it is 16"),
        (["train.init_from={uri}", "data.image_size=64"], r"data.image_size 32, now it is 64"),
        (["train.init_from={uri}@soon"], r"train.init_from: 'soon' is no step; write RUN or RUN@STEP"),
    ],
)
def test_weights_that_cannot_be_had_are_refused(
    small_settings: list[str], tmp_path: Path, source: Config, options: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        loop.preflight(
            configure(small_settings, tmp_path, *(text.format(uri=source.run.uri) for text in options)), 1, "workers"
        )
    assert not (tmp_path / "small").exists()


def test_the_weights_a_run_began_with_may_not_change(small_settings: list[str], tmp_path: Path, source: Config) -> None:
    loop.train(configure(small_settings, tmp_path, "train.steps=1"), CPU)
    changed = configure(small_settings, tmp_path, f"train.init_from={source.run.uri}")
    with pytest.raises(UserError, match=r"train.init_from: the run .* was begun with None"):
        loop.preflight(changed, 1, "workers")


# Stopped


def test_a_stop_saves_after_the_next_step_and_changes_nothing(small_settings: list[str], tmp_path: Path) -> None:
    reference, settings = (
        configure(small_settings, tmp_path / name, "checkpoint.every_seconds=1000") for name in ("reference", "run")
    )
    loop.train(reference, CPU)
    for expected in range(6):
        host = Host()
        host.stop()
        ended = loop.train(settings, CPU, host)
        assert (ended.start, ended.done) == (expected, expected + 1)
        assert ended.why == ("stopped" if expected < 5 else "finished")
    assert_same_state(newest(settings)[1], newest(reference)[1])


WORKER = """
import os, sys, torch
import torch.distributed as dist
from autopainter import config, loop
from autopainter.host import Host

class OneStops(Host):
    asked = 0
    def stop_requested(self):
        self.asked += 1
        return dist.get_rank() == 1 and self.asked == 3

dist.init_process_group("gloo")
settings = config.load(None, sys.argv[1:], environment={})
print(loop.train(settings, torch.device("cpu"), OneStops()))
"""


def group(settings: list[str], world: int) -> list[str]:
    """Train with some processes; what each printed."""
    (port,) = free_ports(1)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *settings],
            cwd=ROOT, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    return [program.communicate(timeout=PATIENCE_SECONDS)[0].strip() for program in programs]


def test_when_one_worker_is_asked_all_stop_after_the_same_step(small_settings: list[str], tmp_path: Path) -> None:
    said = group([*small_settings, f"run.storage={tmp_path}"], 2)
    assert said == ["Ended(start=0, done=3, why='stopped')"] * 2
    assert newest(configure(small_settings, tmp_path))[0] == 3


# Out of storage


def test_a_run_that_cannot_save_goes_on_for_a_while_and_then_stops(
    small_settings: list[str], tmp_path: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("train.steps=100000", "checkpoint.every_seconds=0.1", "checkpoint.max_age_seconds=8")
    settings = configure(small_settings, small_disk, *options)
    with pytest.raises(CheckpointTooOld, match=r"for \d+ s \(checkpoint.max_age_seconds: 8\): .*No space left"):
        loop.train(settings, CPU)
    assert caplog.text.count("could not be saved, training goes on") > 1


# The best


def test_the_best_checkpoint_outlives_newer_ones(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are measured every second step; the third measurement is the best."""
    scores = iter([10.0, 11.0, 15.0, 12.0, 15.0, 9.0])
    monkeypatch.setattr("autopainter.reporter.Reporter._validate", lambda self, done: next(scores))
    options = ("train.steps=12", "telemetry.image_every_steps=2", "checkpoint.every_seconds=1000", "checkpoint.keep=1")
    settings = configure(small_settings, tmp_path, *options)
    loop.train(settings, CPU)
    run = run_of(settings)
    assert {step: checkpoint.read(run, step).score for step in checkpoint.steps(run)} == {6: 15.0, 12: 9.0}


def test_the_journal_of_a_run(small_settings: list[str], tmp_path: Path) -> None:
    run = run_of(configure(small_settings, tmp_path))
    for number in range(3):
        journal.write(run, "killed", f"worker {number}\n  died", 40 + number)
    run.write("journal/00000000000000000001-x.json", b"{")
    entries = journal.read(run)
    assert [(entry.kind, entry.text, entry.step) for entry in entries] == [
        ("killed", f"worker {number} died", 40 + number) for number in range(3)
    ]
    assert journal.counts(run) == {"killed": 3}
