"""The commands about checkpoints as a user meets them: what they print, exit codes, and what is left in storage.

They run by the entry point of the program in this process, on a folder and on a real S3 server.
Run: pytest tests/test_cli_checkpoints.py
"""

import json
import logging
from datetime import datetime

import cv2
import numpy as np
import pytest
import torch

from autopainter import checkpoint
from autopainter import config as configuration
from autopainter.checkpoint import CheckpointWriter, Retention, begin_attempt
from autopainter.checkpoint import files as stored
from autopainter.storage import LocalStore, open_store
from autopainter.storage.s3 import shared_client
from autopainter.trainer import build_generator

SETTINGS = ["run.name=small", "run.storage=/tmp", "data.manifest=m", "train.steps=1", "loss.feature_weight=0",
            "data.image_size=32", "model.generator_width=4", "train.precision=float32"]  # fmt: skip


@pytest.fixture
def call(call):
    """Run ``autopainter checkpoints`` or, by ``group``, another command."""

    def run(*command, group=("checkpoints",)):
        return call(*group, *command)

    return run


def config(*settings):
    return configuration.load(None, [*SETTINGS, *settings], {})


def save(run, steps, attempt=None, scores=(), settings=(), keep=99):
    """Save checkpoints of a network that can paint; the attempt."""
    own = config(*settings)
    meta = {"manifest_id": "0" * 64, "config": own.model_dump(mode="json")}
    attempt = attempt or begin_attempt(run, {})
    writer = CheckpointWriter(run, attempt, Retention(keep), meta)
    for number, step in enumerate(steps):
        torch.manual_seed(step)
        state = {f"average.{name}": tensor for name, tensor in build_generator(own).state_dict().items()}
        writer.save(step, state | {"step": torch.tensor(step)}, scores[number] if scores else None)
    writer.wait()
    assert writer.error is None
    return attempt


def file(step, name="state", attempt=1):
    return f"checkpoints/{step:08d}/{attempt:06d}/{name}.safetensors"


def of(step, attempt=1):
    return {f"checkpoints/{step:08d}.json", file(step, "weights", attempt), file(step, "state", attempt)}


def keys(run):
    return {entry.key for entry in run.list("checkpoints/")}


def damage(run, key):
    """One bit of an object, seen by its checksum only."""
    data = run.read(key)
    run.write(key, data[:-1] + bytes([data[-1] ^ 1]))


# What is no run


@pytest.mark.parametrize("command", ["list", "verify", "pull", "prune"])
def test_a_place_without_checkpoints_is_said(store, call, tmp_path, command):
    options = ["-o", tmp_path / "copy"] if command == "pull" else []
    done = call(command, store.uri, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"autopainter: {store.uri}: there is no checkpoint; is this STORAGE/NAME of a run that has saved one?\n"
    )


@pytest.mark.parametrize("command", ["verify", "pull"])
def test_a_step_that_was_not_saved_is_said(folder, call, tmp_path, command):
    save(folder, [2, 4])
    options = ["-o", tmp_path / "copy"] if command == "pull" else []
    done = call(command, folder.uri, "--step", 3, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"autopainter: {folder.uri}: there is no checkpoint of step 3; saved steps: [2, 4]\n"


# list


def test_list(store, succeed):
    save(store, [2], scores=[17.25])
    save(store, [4, 6], scores=[19.5, None])
    title, *lines = succeed("list", store.uri).splitlines()
    assert title.split() == ["step", "attempt", "written", "MB", "score"]
    rows = [line.split() for line in lines]
    assert [(row[0], row[1], row[4:]) for row in rows] == [
        ("2", "1", ["17.25"]), ("4", "2", ["19.50", "best"]), ("6", "2", ["-", "newest"])
    ]  # fmt: skip
    for row in rows:
        written = datetime.fromisoformat(row[2])
        assert abs(written.timestamp() - checkpoint.read(store, int(row[0])).written) < 1
        assert written.utcoffset() == datetime.now().astimezone().utcoffset()
        assert float(row[3]) == round(checkpoint.read(store, int(row[0])).bytes / 1e6, 1)
    assert {len(line.partition("  best")[0].partition("  newest")[0]) for line in lines} == {len(title)}


def test_list_as_json(store, succeed):
    save(store, [2, 4], scores=[17.25, None])
    store.write("checkpoints/00000006.json", b"half")
    store.delete([file(4)])
    rows = json.loads(succeed("list", store.uri, "--json"))
    assert [row["step"] for row in rows] == [2, 4, 6]
    two = checkpoint.read(store, 2)
    written = datetime.fromtimestamp(two.written).astimezone().isoformat(timespec="seconds")
    assert rows[0] == {"step": 2, "attempt": 1, "written": written, "bytes": two.bytes, "score": 17.25,
                       "marks": ["newest", "best"], "damaged": None}  # fmt: skip
    assert "missing" in rows[1]["damaged"]
    assert rows[1]["marks"] == []
    assert store.locate("checkpoints/00000006.json") in rows[2]["damaged"]


def test_damaged_checkpoints_are_shown(store, succeed):
    save(store, [2, 4, 6])
    store.write("checkpoints/00000006.json", b"half")
    store.write(file(4), b"half")
    two, four, six = succeed("list", store.uri).splitlines()[1:]
    assert "newest" in two
    assert f"DAMAGED: {store.locate(file(4))}: 4 bytes, but" in four
    assert six.startswith(f"         6  DAMAGED: {store.locate('checkpoints/00000006.json')}")


# verify


def test_verify(store, call, succeed):
    save(store, [2, 4, 6])
    assert succeed("verify", store.uri) == "step 2: good\nstep 4: good\nstep 6: good\n"
    damage(store, file(4))
    done = call("verify", store.uri)
    assert (done.returncode, done.stderr) == (1, "")
    two, four, six = done.stdout.splitlines()
    assert (two, six) == ("step 2: good", "step 6: good")
    assert four.startswith(f"step 4: DAMAGED: {store.locate(file(4))}: ")
    assert succeed("verify", store.uri, "--step", 6) == "step 6: good\n"
    assert call("verify", store.uri, "--step", 4).stdout == f"{four}\n"


# pull


def test_what_is_pulled_can_be_painted_with(store, succeed, tmp_path):
    save(store, [2, 4])
    copy = tmp_path / "copy"
    assert succeed("pull", store.uri, "-o", copy).startswith(f"{copy}: step 4, ")
    assert keys(LocalStore(str(copy))) == of(4)
    cv2.imwrite(str(tmp_path / "sketch.png"), np.full((32, 32), 255, np.uint8))
    for run, name in ((store.uri, "one.png"), (copy, "other.png")):
        succeed("--run", run, tmp_path / "sketch.png", "-o", tmp_path / name, group=["paint"])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_training_could_continue_where_a_checkpoint_was_pulled_to(store, succeed, tmp_path):
    """The next attempt there counts on from the one that wrote it; else it could not delete it when it is old."""
    for _ in range(3):
        attempt = begin_attempt(store, {})
    save(store, [4], attempt)
    succeed("pull", store.uri, "-o", tmp_path / "copy")
    copy = open_store(str(tmp_path / "copy"))
    found, state = checkpoint.newest(copy)
    assert found == checkpoint.read(store, 4)
    assert state["step"] == 4
    assert save(copy, [6], keep=1) == 4
    assert keys(copy) == of(6, 4)


def test_a_damaged_newest_is_named_and_passed_over(store, call, tmp_path):
    save(store, [2, 4, 6])
    damage(store, file(4))
    store.write("checkpoints/00000006.json", b"half")
    done = call("pull", store.uri, "-o", tmp_path / "copy")
    assert done.returncode == 0
    six, four = done.stderr.splitlines()
    assert six.startswith("step 6: DAMAGED, the one before is tried: ")
    assert four.startswith("step 4: DAMAGED, the one before is tried: ")
    assert keys(LocalStore(str(tmp_path / "copy"))) == of(2)


@pytest.mark.parametrize("options", [["--step", 4], []])
def test_if_what_is_wanted_is_damaged_nothing_is_left(store, call, tmp_path, options):
    save(store, [4])
    damage(store, file(4))
    done = call("pull", store.uri, "-o", tmp_path / "copy", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"autopainter: {store.locate(file(4))}: ")
    assert LocalStore(str(tmp_path / "copy")).list() == []


def test_the_same_pull_again_mends_the_copy_and_never_harms_it(store, call, succeed, tmp_path):
    save(store, [2, 4])
    copy = LocalStore(str(tmp_path / "copy"))
    pull = ["pull", store.uri, "--step", 4, "-o", copy.uri]
    succeed(*pull)
    before = {entry.key: copy.read(entry.key) for entry in copy.list()}
    succeed(*pull)
    assert {entry.key: copy.read(entry.key) for entry in copy.list()} == before
    damage(copy, file(4))
    copy.delete([file(4, "weights")])
    succeed(*pull)
    assert {entry.key: copy.read(entry.key) for entry in copy.list()} == before

    damage(store, file(4))  # the copy is the only good one now
    succeed(*pull)
    damage(copy, file(4, "weights"))
    assert call(*pull).returncode == 1
    assert keys(copy) == of(4)
    assert succeed("pull", store.uri, "--step", 2, "-o", copy.uri)
    assert keys(copy) == of(2) | of(4)


@pytest.mark.parametrize("there", ["another", "damaged"])
def test_another_checkpoint_of_the_step_is_refused(store, call, tmp_path, there):
    save(store, [4])
    other = LocalStore(str(tmp_path / "other"))
    save(other, [4])
    if there == "damaged":
        other.write("checkpoints/00000004.json", b"half")
    before = {entry.key: other.read(entry.key) for entry in other.list()}
    done = call("pull", store.uri, "-o", other.uri)
    assert (done.returncode, done.stdout) == (2, "")
    assert other.locate("checkpoints/00000004.json") in done.stderr
    assert "choose another folder" in done.stderr
    assert {entry.key: other.read(entry.key) for entry in other.list()} == before


def test_a_commit_that_names_files_elsewhere_is_damaged(folder, call, tmp_path):
    """It may come from somebody else: nothing is written outside the folder."""
    save(folder, [4])
    commit = json.loads(folder.read("checkpoints/00000004.json"))["commit"]
    commit["files"]["state.safetensors"]["key"] = "../../outside"
    folder.write("checkpoints/00000004.json", stored._encode(commit))
    done = call("pull", folder.uri, "-o", tmp_path / "deep" / "copy")
    assert done.returncode == 1
    assert "../../outside" in done.stderr
    assert not (tmp_path / "deep").exists()


# prune


def test_prune(store, succeed):
    attempt = save(store, [2, 4, 6, 8], scores=[1, 9, 2, 3])
    size = sum(entry.bytes for entry in store.list("checkpoints/") if entry.key in of(2) | of(6))
    begin_attempt(store, {})
    before = keys(store)
    options = ["prune", store.uri, "--keep", 1, "--keep-best", 1]
    planned = succeed(*options, "--dry-run")
    assert keys(store) == before
    done = succeed(*options)
    assert planned == done.replace("deleted", "would be deleted")
    assert keys(store) == of(4, attempt) | of(8, attempt)
    two, six, total = done.splitlines()
    assert two.startswith("step 2: deleted, ")
    assert six.startswith("step 6: deleted, ")
    assert total == f"kept: step 4, step 8; deleted: {size / 1e6:.1f} MB"
    assert succeed(*options) == "kept: step 4, step 8; deleted: 0.0 MB\n"


def test_as_many_are_kept_as_the_run_itself_keeps(folder, succeed):
    settings = ["checkpoint.keep=2", "checkpoint.keep_best=1"]
    save(folder, [2, 4, 6, 8], scores=[9, 1, 2, 3], settings=settings)
    succeed("prune", folder.uri)
    assert checkpoint.steps(folder) == [2, 6, 8]
    succeed("prune", folder.uri, "--keep", 1)
    assert checkpoint.steps(folder) == [2, 8]
    succeed("prune", folder.uri, "--keep-best", 0)
    assert checkpoint.steps(folder) == [2, 8]


def test_damaged_ones_do_not_count(store, succeed):
    save(store, [2, 4, 6, 8], scores=[1, 9, 2, 3])
    damage(store, file(4))
    damage(store, file(6))
    done = succeed("prune", store.uri, "--keep", 2, "--keep-best", 1)
    assert keys(store) == of(2) | of(8)
    assert f"; damaged: {store.locate(file(4))}" in done


def test_if_all_are_damaged_none_is_deleted(store, call):
    save(store, [2, 4])
    damage(store, file(2))
    store.write("checkpoints/00000004.json", b"half")
    before = keys(store)
    done = call("prune", store.uri, "--keep", 1, "--keep-best", 0)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no checkpoint is good, so none is deleted: step 4: " in done.stderr
    assert store.locate(file(2)) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert keys(store) == before


def test_what_the_latest_attempt_may_be_writing_is_left_alone(store, succeed):
    """It has passed over a damaged checkpoint, and writes one before it, and one in its place."""
    save(store, [2, 4, 6])
    damage(store, file(6))
    begin_attempt(store, {})
    writing = {file(5, "weights", 2), file(6, "weights", 2)}
    orphans = {file(3), file(5), file(7)}  # of attempt 1, which is dead
    for key in writing | orphans:
        store.write(key, b"half")
    done = succeed("prune", store.uri, "--keep", 1, "--keep-best", 0)
    assert keys(store) == of(4) | of(6) | writing
    assert "3 files without a commit: deleted, 0.0 MB" in done
    assert "step 6: DAMAGED, but the run may be replacing it; left alone: " in done

    save(store, [5, 6], attempt=2)  # it is not disturbed
    assert checkpoint.newest(store)[0].step == 6


def test_what_the_latest_attempt_has_left_behind_it_is_deleted(store, succeed):
    """Its steps rise, so before its newest checkpoint it writes nothing any more."""
    save(store, [2])
    attempt = save(store, [4, 6])
    for step in (5, 7):
        store.write(file(step, attempt=attempt), b"half")
    succeed("prune", store.uri, "--keep", 9, "--keep-best", 0)
    assert keys(store) == of(2) | of(4, attempt) | of(6, attempt) | {file(7, attempt=attempt)}


def test_prune_beside_a_run_that_saves(folder, succeed):
    """Files are there and verified, the commit is not: prune comes at the worst moment."""
    attempt = save(folder, [2, 4, 6])
    writer = CheckpointWriter(folder, attempt, Retention(9), checkpoint.read(folder, 6).meta)
    state = {"average.weight": torch.ones(3), "generator.weight": torch.zeros(3)}
    outputs = []
    writer.save(8, state, before_commit=lambda: outputs.append(
        succeed("prune", folder.uri, "--keep", 1, "--keep-best", 0)))  # fmt: skip
    writer.wait()
    assert writer.error is None
    assert len(outputs) == 1
    assert keys(folder) == of(6) | of(8)
    assert checkpoint.newest(folder)[0].step == 8


def test_unfinished_uploads_of_earlier_attempts_are_aborted(runs_uri, succeed):
    bucket, _, prefix = runs_uri.removeprefix("s3://").partition("/")
    store, client = open_store(runs_uri), shared_client()
    save(store, [2])
    save(store, [4])

    def uploads():
        listed = client.list_multipart_uploads(Bucket=bucket, Prefix=f"{prefix}/")
        return {entry["Key"].removeprefix(f"{prefix}/") for entry in listed.get("Uploads", ())}

    old, live = {file(3), file(9), file(3, attempt=2)}, {file(5, attempt=2), file(5, attempt=3)}
    for key in old | live:
        client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{key}")
    options = ["prune", runs_uri, "--keep", 9]
    assert "3 unfinished uploads: would be deleted" in succeed(*options, "--dry-run")
    assert uploads() == old | live
    assert "3 unfinished uploads: deleted" in succeed(*options)
    assert uploads() == live


def test_reading_is_quiet(folder, succeed, caplog):
    """What the program's log says of a run is no business of these commands."""
    caplog.set_level(logging.INFO)
    save(folder, [2])
    caplog.clear()
    succeed("list", folder.uri)
    succeed("verify", folder.uri)
    assert caplog.records == []
