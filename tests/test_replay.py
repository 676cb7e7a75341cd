"""A step done again: that it is the same step, and that it shows the sample that stopped a run; a run's history.

Reference: the values that the run itself logged to TensorBoard, or that its guard left; the guilty sample is one whose
pixels a patched loss answers with infinity. Run: pytest tests/test_replay.py
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Done
from processes import free_ports
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from waiting import PATIENCE_SECONDS, complaints

from autopainter import checkpoint, config, journal, loop, losses, storage
from autopainter import replay as replaying
from autopainter.config import Config
from autopainter.data import manifest as manifests
from autopainter.data.stream import Batch, TrainingStream
from autopainter.errors import Diverged, UserError
from autopainter.pixels import to_unit
from autopainter.trainer import SCALARS, Trainer

CPU = torch.device("cpu")
SPOILT = 5  # the step, counted from 1
ROW = 3  # of the global batch


def configure(small_settings: list[str], place: Path, *changes: str) -> Config:
    return config.load(None, [*small_settings, f"run.storage={place}", *changes], environment={})


def batch_of(settings: Config, step: int) -> Batch:
    """The global batch of a step that is counted from 1."""
    stream = TrainingStream(manifests.load(settings.data.manifest), settings, 0, 1, step - 1)
    try:
        return next(stream)
    finally:
        stream.close()


def spoil(monkeypatch: pytest.MonkeyPatch, target: torch.Tensor) -> None:
    """Make the pixel loss infinite for this picture, uint8 [3, S, S], wherever it is in a batch."""
    pixel = losses.pixel

    def spoilt(painted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        there = (targets == to_unit(target)).flatten(1).all(dim=1).any()
        return pixel(painted, targets) + (float("inf") if there else 0)

    monkeypatch.setattr(losses, "pixel", spoilt)


def logged(run: Path, step: int) -> dict[str, float]:
    """What TensorBoard shows of a step."""
    events = EventAccumulator(str(run / "events"), size_guidance={"scalars": 0}).Reload()
    return {name: next(e.value for e in events.Scalars(name) if e.step == step) for name in SCALARS}


def left_by_the_guard(run: Path, step: int = SPOILT) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / f"diverged/{step:08d}.json").read_text())
    return document


def contents(run: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


# A run that diverged


@pytest.mark.parametrize("saves", ["each step", "never"])
def test_the_guilty_sample_is_shown(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Done], saves: str
) -> None:
    changes = [] if saves == "each step" else ["checkpoint.every_seconds=3000"]
    settings, run = configure(small_settings, tmp_path, *changes), tmp_path / "small"
    batch = batch_of(settings, SPOILT)
    spoil(monkeypatch, batch.color[ROW])
    with pytest.raises(
        Diverged, match=rf"step {SPOILT}: generator/loss, generator/pixel not finite; .* replay {run}@5"
    ):
        loop.train(settings, CPU)
    left = left_by_the_guard(run)
    assert left["samples"] == batch.keys
    assert (left["step"], left["workers"]) == (SPOILT, 1)
    assert config.restore(left["config"], "") == settings
    before = contents(run)

    found = replaying.replay(str(run), SPOILT, CPU)
    assert found.start == (SPOILT - 1 if saves == "each step" else 0)
    assert found.recorded == found.scalars == {name: float(value) for name, value in left["values"].items()}
    assert [sample.key for sample in found.samples] == batch.keys
    assert [replaying.not_finite(sample.terms) for sample in found.samples] == [
        ["generator/pixel"] if row == ROW else [] for row in range(8)
    ]

    done = call("replay", f"{run}@{SPOILT}", "--device", "cpu")
    assert (done.returncode, complaints(done.stderr)) == (0, "")
    marked = [line.split() for line in done.stdout.splitlines() if "<--" in line]
    assert [words[0] for words in marked] == ["generator/loss", "generator/pixel", batch.keys[ROW]]
    assert marked[-1][-3:] == ["not", "finite:", "pixel"]
    assert "1 of 8 samples: not finite" in done.stdout
    as_json = json.loads(call("replay", f"{run}@{SPOILT}", "--device", "cpu", "--json").stdout)
    assert as_json["samples"][ROW]["terms"]["generator/pixel"] == as_json["scalars"]["generator/loss"] == "inf"
    assert contents(run) == before


def test_what_no_sample_alone_shows_is_said(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Done]
) -> None:
    """Gradients that are infinite while all losses are finite; and later, without the reason, nothing is."""
    settings, run = configure(small_settings, tmp_path, "train.steps=2"), tmp_path / "small"
    total_variation = losses.total_variation

    def spoilt(painted: torch.Tensor) -> torch.Tensor:
        if painted.requires_grad:
            painted.register_hook(lambda gradient: gradient * float("inf"))
        return total_variation(painted)

    with monkeypatch.context() as patch:
        patch.setattr(losses, "total_variation", spoilt)
        with pytest.raises(Diverged):
            loop.train(settings, CPU)
        done = call("replay", f"{run}@1", "--device", "cpu")
    assert (
        "No sample alone is the reason: it is in the gradients, or in the step (generator/gradient_norm)" in done.stdout
    )
    assert "All finite here" in call("replay", f"{run}@1", "--device", "cpu").stdout


def test_a_step_that_was_not_finite_on_the_way_is_named(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings, run = configure(small_settings, tmp_path), tmp_path / "small"
    loop.train(configure(small_settings, tmp_path, "train.steps=3", "checkpoint.keep=20"), CPU)
    for saved in run.glob("checkpoints/*.json"):
        if saved.stem == "00000002":
            saved.unlink()
    spoil(monkeypatch, batch_of(settings, 2).color[ROW])
    replaying.replay(str(run), 3, CPU)
    assert "step 2, on the way, was not finite already: generator/loss, generator/pixel" in caplog.text


# A healthy step


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_healthy_step_is_repeated_bit_for_bit(small_settings: list[str], tmp_path: Path, norm: str) -> None:
    """By the program in a process of its own, from a checkpoint some steps before."""
    changes = ("checkpoint.keep=20", f"model.norm={norm}", "train.steps=8", "model.discriminator_width=4")
    settings, run = configure(small_settings, tmp_path, *changes), tmp_path / "small"
    loop.train(settings, CPU)
    for step in (5, 6):
        (run / f"checkpoints/{step:08d}.json").unlink()
    before = contents(run)
    command = [str(Path(sys.executable).parent / "autopainter"), "replay", f"{run}@7", "--device", "cpu", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert (done.returncode, complaints(done.stderr)) == (0, "")
    found = json.loads(done.stdout)
    assert (found["start"], found["recorded"]) == (4, None)
    assert found["scalars"] == logged(run, 7)
    assert [sample["key"] for sample in found["samples"]] == batch_of(settings, 7).keys
    assert contents(run) == before
    if norm == "instance":  # no coupling: the discriminator's loss, computed before any weight changes, is their mean
        mean = sum(sample["terms"]["discriminator/loss"] for sample in found["samples"]) / 8
        assert mean == pytest.approx(found["scalars"]["discriminator/loss"], rel=1e-5)


def test_the_end_is_that_of_the_newest_checkpoint(small_settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "small"
    for steps in (2, 4):
        loop.train(configure(small_settings, tmp_path, f"train.steps={steps}", "checkpoint.keep=1"), CPU)
        if steps == 2:
            shutil.copytree(run / "checkpoints", tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", run / "checkpoints", dirs_exist_ok=True)
    found = replaying.replay(str(run), 4, CPU)
    assert (found.start, found.scalars) == (2, logged(run, 4))
    with pytest.raises(UserError, match=r"small@5: there is no such step: train.steps of the run is 4"):
        replaying.replay(str(run), 5, CPU)


# Several workers

WORKER = f"""
import json, os, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
from autopainter import config, loop, losses, trainer

target, pixel, step = trainer.to_unit(torch.load(sys.argv[1])), losses.pixel, trainer.Trainer.step
keys = []

def spoilt(painted, targets):
    there = (targets == target).flatten(1).all(dim=1).any()
    return pixel(painted, targets) + (float("inf") if there else 0)

def noted(self, number, batch, requests=()):
    keys.append(batch.keys)
    return step(self, number, batch, requests)

losses.pixel, trainer.Trainer.step = spoilt, noted
dist.init_process_group("gloo")
try:
    loop.train(config.load(None, sys.argv[2:], environment={{}}), torch.device("cpu"))
except ArithmeticError as error:
    print(json.dumps({{"error": str(error), "keys": keys[{SPOILT} - 1]}}))
"""


def test_what_two_workers_met_is_replayed_in_one_process(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, run = configure(small_settings, tmp_path, "checkpoint.keep=20"), tmp_path / "small"
    target = batch_of(settings, SPOILT).color[ROW]
    torch.save(target, tmp_path / "target.pt")
    (port,) = free_ports(1)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    texts = [*small_settings, f"run.storage={tmp_path}", "checkpoint.keep=20"]
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "target.pt"), *texts], cwd=ROOT,
            env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [json.loads(program.communicate(timeout=PATIENCE_SECONDS)[0]) for program in programs]
    assert all("generator/loss, generator/pixel not finite" in worker["error"] for worker in said)

    left = left_by_the_guard(run)
    assert sorted(left["samples"]) == sorted([*said[0]["keys"], *said[1]["keys"]])
    assert left["samples"][::2] == said[0]["keys"]
    spoil(monkeypatch, target)
    found = replaying.replay(str(run), SPOILT, CPU)
    assert (found.workers, found.microbatch) == (2, 4)
    assert found.recorded == pytest.approx(found.scalars, rel=1e-5)
    guilty = [sample.key for sample in found.samples if replaying.not_finite(sample.terms)]
    assert guilty == [left["samples"][ROW]]
    assert replaying.replay(str(run), 3, CPU).scalars == pytest.approx(logged(run, 3), rel=1e-5)


# What cannot be replayed


@pytest.fixture
def short(small_settings: list[str], tmp_path: Path) -> Path:
    """A run of two steps with the checkpoint of step 2 only, on a copy of the data set."""
    data, copy = (storage.open_store(uri) for uri in (small_settings[2].partition("=")[2].rpartition("/")[0],
                                                      str(tmp_path / "data")))  # fmt: skip
    for entry in data.list():
        copy.write(entry.key, data.read(entry.key))
    changes = (f"data.manifest={tmp_path}/data/manifest.json", "train.steps=2", "checkpoint.every_seconds=3000")
    loop.train(configure(small_settings, tmp_path, *changes), CPU)
    return tmp_path / "small"


def test_bad_input_is_one_line(short: Path, call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(text: str) -> str:
        done = call("replay", text, "--device", "cpu")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        return done.stderr

    for text in (str(short), f"{short}@", f"{short}@0", f"{short}@-1", f"{short}@x", "@1"):
        assert "write it as RUN@STEP" in refused(text)
    assert "there is no run" in refused(f"{short}-other@1")
    assert "there is no such step: train.steps of the run is 2" in refused(f"{short}@3")
    again = call("replay", f"{short}@2", "--device", "cpu")  # its only checkpoint is of step 2
    assert (again.returncode, "from the beginning" in again.stdout) == (0, True)
    assert "unknown kind of storage" in refused("gs://bucket/run@1")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert "torch finds no GPU here" in call("replay", f"{short}@1", "--device", "cuda").stderr

    saved = json.loads((short / "checkpoints/00000002.json").read_text())["commit"]["meta"]
    (short / "diverged").mkdir()
    (short / "diverged/00000001.json").write_text(json.dumps({
        "step": 1, "values": dict.fromkeys(SCALARS, "nan"), "samples": [], "workers": 1, **saved,
    }))  # fmt: skip
    assert call("replay", f"{short}@1", "--device", "cpu").returncode == 0
    data = short.parent / "data"
    (data / "train-00000.tar").rename(data / "away")
    assert "train-00000.tar is not the shard that the manifest describes" in refused(f"{short}@1")
    manifest = data / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"info":{', '"info":{"other":1,'))
    assert "is another data set" in refused(f"{short}@1")
    manifest.unlink()
    assert "manifest.json: not found" in refused(f"{short}@1")


def test_the_guards_document_of_another_beginning_or_a_damaged_one_is_passed_over(
    short: Path, call: Callable[..., Done], caplog: pytest.LogCaptureFixture
) -> None:
    """A run that diverged before its first checkpoint may be begun again with another learning rate."""
    saved = json.loads((short / "checkpoints/00000002.json").read_text())["commit"]["meta"]
    own = {"values": {}, "workers": 1, **saved}
    other = own | {"config": {**own["config"], "train": own["config"]["train"] | {"learning_rate": 1e-3}}}
    (short / "diverged").mkdir()
    place = short / "diverged/00000001.json"
    for text, said in (
        (json.dumps(other), "of another configuration or data set than the run's checkpoints"),
        (json.dumps(own)[:-5], "passed over"), (json.dumps({"step": 1, "samples": []}), "passed over: 'config'"),
        ("[]", "passed over"),
    ):  # fmt: skip
        place.write_text(text)
        done = call("replay", f"{short}@1", "--device", "cpu")
        assert done.returncode == 0
        assert said in caplog.text
        caplog.clear()
    weights = own["config"]["train"] | {"init_from": "s3://runs/other"}
    shutil.rmtree(short / "checkpoints")
    place.unlink()
    assert "nothing to begin with: no checkpoint" in call("replay", f"{short}@1").stderr
    place.write_text(json.dumps(own | {"config": {**own["config"], "train": weights}}))
    assert "it began with the weights of s3://runs/other" in call("replay", f"{short}@1").stderr


def test_too_little_memory_is_one_line(short: Path, call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer, "terms", fail)
    saved = json.loads((short / "checkpoints/00000002.json").read_text())["commit"]["meta"]
    (short / "diverged").mkdir()
    (short / "diverged/00000001.json").write_text(json.dumps({"values": {}, "workers": 1, **saved}))
    done = call("replay", f"{short}@1", "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "autopainter: CUDA out of memory.; --device cpu takes the host's memory instead\n"


# The history of a run


def test_the_journal_is_one_list_by_time(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Done]
) -> None:
    settings, run = configure(small_settings, tmp_path), tmp_path / "small"
    store = storage.open_store(str(run))
    with monkeypatch.context() as patch:
        spoil(patch, batch_of(settings, SPOILT).color[ROW])
        with pytest.raises(Diverged):
            loop.train(settings, CPU)
    journal.write(store, "preempted", "a node that runs a worker is taken away", None)
    said = call("journal", run)
    assert (said.returncode, complaints(said.stderr)) == (0, "")
    lines = said.stdout.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["attempt", "diverged", "preempted"]
    assert "step        0  attempt 1 begins on 1 worker(s)" in lines[0]
    assert "generator/pixel not finite" in lines[1]
    assert lines[3:] == ["newest checkpoint: step 4 of 12; the run is not finished"]

    loop.train(settings, CPU)
    checkpoint.begin_attempt(store, {"overwrites": True})
    checkpoint.begin_attempt(store, {"pulled_from": "s3://runs/other"})
    found = json.loads(call("journal", run, "--json").stdout)
    assert [event["kind"] for event in found["events"]] == ["attempt", "diverged", "preempted", *["attempt"] * 3]
    assert [event["step"] for event in found["events"]] == [0, 5, None, 4, None, None]
    assert [event.get("workers") for event in found["events"]] == [1, None, None, 1, None, None]
    assert [event["text"] for event in found["events"][-2:]] == [
        "attempt 3 deletes the run that was here (--overwrite)",
        "attempt 4 is a copy of a checkpoint of s3://runs/other",
    ]
    assert (found["newest_checkpoint"], found["steps"], found["finished"]) == (12, 12, True)
    assert call("journal", run).stdout.endswith("\nnewest checkpoint: step 12 of 12; the run is finished\n")


def test_the_journal_says_that_the_last_attempt_has_not_ended(tmp_path: Path, call: Callable[..., Done]) -> None:
    store = storage.open_store(str(tmp_path / "killed"))
    checkpoint.begin_attempt(store, {"step": 0, "workers": 2})
    journal.write(store, "killed", "worker 1: its process was killed", 0)
    assert "no end" not in call("journal", store.uri).stdout
    checkpoint.begin_attempt(store, {"step": 0, "workers": 2})
    said = call("journal", store.uri).stdout.splitlines()[-1]
    assert said == "attempt 2 has told of no end: it still runs, or its driver was killed"


def test_the_journal_of_no_run_and_of_damaged_records(
    tmp_path: Path, call: Callable[..., Done], caplog: pytest.LogCaptureFixture
) -> None:
    done = call("journal", tmp_path / "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"autopainter: {tmp_path}/none: there is no run; RUN is STORAGE/NAME, a folder or an s3:// URI\n"
    )
    store = storage.open_store(str(tmp_path / "run"))
    checkpoint.begin_attempt(store, {"step": 7, "workers": 3})
    for number, damaged in enumerate((b"", b"[]", b"{}", b'{"started": 1, "step": "x"}', b'{"started": null}'), 2):
        store.write(f"attempts/{number:06d}.json", damaged)
    (attempt,) = checkpoint.read_attempts(store)
    assert (attempt.number, attempt.step, attempt.workers) == (1, 7, 3)
    assert math.isfinite(attempt.started)
    assert caplog.text.count("damaged, passed over") == 5
    said = call("journal", tmp_path / "run").stdout
    assert "attempt 1 begins on 3 worker(s)\nno checkpoint: the run would begin at step 0\n" in said
