"""Checkpoints on a folder and on a real S3 server: what is written, what is found again, what is damaged or fenced out.

The faults are made by hand: bytes of stored objects are cut off, flipped and deleted, and stores that wait or lose
bytes are folders with one method changed. A process is killed here inside an upload; others are in other files.
Run: pytest tests/test_checkpoint.py
"""

import errno
import http.server
import json
import logging
import math
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from waiting import PATIENCE_SECONDS

from autopainter import checkpoint
from autopainter.checkpoint import CheckpointWriter, Retention, begin_attempt
from autopainter.checkpoint import files as stored
from autopainter.errors import CorruptData, StorageError, Superseded, Unreadable, UserError
from autopainter.storage import LocalStore, open_store
from autopainter.storage.s3 import shared_client

META = {"manifest_id": "ab12", "config": {"train": {"seed": 0}}}


def tensors(step):
    """A state with every kind of tensor that a trainer has, and values of its step."""
    values = torch.arange(72, dtype=torch.float32).view(2, 3, 4, 3) + step
    return {
        "average.conv.weight": values.contiguous(memory_format=torch.channels_last),
        "average.conv.bias": torch.full((2,), float(step)),
        "generator.conv.weight": -values,
        "generator.norm.num_batches_tracked": torch.tensor(step),
        "optimizer.generator.exp_avg.conv.weight": values.bfloat16(),
    }


def save(store, step, attempt=1, keep=9, keep_best=0, score=None, **options):
    """Save one checkpoint and wait for it; the writer."""
    writer = CheckpointWriter(store, attempt, Retention(keep, keep_best), META, **options)
    writer.save(step, tensors(step), score)
    writer.wait()
    return writer


def assert_found(store, step, attempt=1):
    """The newest good checkpoint is that of ``step``, with its state."""
    found, state = checkpoint.newest(store)
    assert (found.step, found.attempt) == (step, attempt)
    assert state.keys() == tensors(step).keys()
    for name, tensor in tensors(step).items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


def files(store):
    """Keys of all that belongs to checkpoints."""
    return {entry.key for entry in store.list("checkpoints/")}


def of(step, attempt=1):
    """Keys of one whole checkpoint."""
    folder = f"checkpoints/{step:08d}/{attempt:06d}"
    return {f"checkpoints/{step:08d}.json", f"{folder}/weights.safetensors", f"{folder}/state.safetensors"}


def damage(store, key, how):
    data = store.read(key)
    middle = len(data) // 2
    if how == "missing":
        store.delete([key])
    else:
        damaged = {
            "truncated": data[:middle],
            "empty": b"",
            "one bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "zeros": bytes(len(data)),
            "other JSON": b"[1]",
        }[how]
        store.write(key, damaged)


# Written and read


def test_a_new_run_has_none(store):
    assert checkpoint.steps(store) == []
    assert checkpoint.newest(store) is None
    assert checkpoint.latest_attempt(store) == 0


def test_what_is_saved_is_read(store):
    reports = []
    writer = save(store, 7, attempt=begin_attempt(store, {}), report=lambda *report: reports.append(report))
    assert writer.error is None
    ((step, seconds, error),) = reports
    assert (step, error) == (7, None)
    assert seconds > 0

    assert checkpoint.steps(store) == [7]
    assert_found(store, 7)
    saved = checkpoint.read(store, 7)
    assert saved.meta == META
    weights = checkpoint.load_weights(store, saved)
    assert weights.keys() == {"conv.weight", "conv.bias"}
    assert torch.equal(weights["conv.weight"], tensors(7)["average.conv.weight"])
    assert files(store) == of(7)


def test_files_without_a_commit_are_invisible(store):
    save(store, 3)
    save(store, 5)
    store.delete([f"checkpoints/{5:08d}.json"])
    assert checkpoint.steps(store) == [3]
    assert_found(store, 3)
    with pytest.raises(CorruptData, match=f"{5:08d}.json"):
        checkpoint.read(store, 5)


def test_the_commit_is_written_last(store):
    seen = []
    writer = CheckpointWriter(store, 1, Retention(9), META)
    writer.save(4, tensors(4), before_commit=lambda: seen.append(files(store)))
    writer.wait()
    assert seen == [of(4) - {f"checkpoints/{4:08d}.json"}]
    assert files(store) == of(4)


def test_training_goes_on_while_a_checkpoint_is_written(folder):
    may_commit, copied = threading.Event(), threading.Event()
    writer = CheckpointWriter(folder, 1, Retention(9), META)
    writer.save(4, tensors(4), before_commit=lambda: may_commit.wait(30))
    assert checkpoint.steps(folder) == []  # and yet save has returned
    second = threading.Thread(target=lambda: (writer.save(5, tensors(5)), copied.set()))
    second.start()
    assert not copied.wait(0.1)  # one copy at a time
    may_commit.set()
    second.join()
    writer.wait()
    assert checkpoint.steps(folder) == [4, 5]
    assert_found(folder, 5)


class WaitingStore(LocalStore):
    """A folder that is as slow as it is told to be."""

    def __init__(self, uri):
        super().__init__(uri)
        self.may_write = threading.Event()

    def write(self, key, data):
        assert self.may_write.wait(30)
        super().write(key, data)


def test_tensors_may_change_as_soon_as_save_returns(tmp_path):
    store, state = WaitingStore(str(tmp_path)), tensors(4)
    writer = CheckpointWriter(store, 1, Retention(9), META)
    writer.save(4, state)
    for tensor in state.values():
        tensor.zero_()
    store.may_write.set()
    writer.wait()
    assert_found(store, 4)


def test_why_a_save_failed_is_known_until_one_succeeds(store):
    """Whoever saves at each step looks only while a save runs."""
    seen, writer = [], CheckpointWriter(store, 1, Retention(9), META)

    def fail():
        seen.append(writer.error)
        raise StorageError("503 SlowDown")

    writer.save(4, tensors(4), before_commit=fail)
    writer.save(5, tensors(5), before_commit=fail)
    writer.save(6, tensors(6), before_commit=lambda: seen.append(writer.error))
    writer.wait()
    assert [str(error) for error in seen] == ["None", "503 SlowDown", "503 SlowDown"]
    assert writer.error is None


# Damage


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "one bit", "zeros"])
@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(store, caplog, name, how):
    for step in (2, 4, 6):
        save(store, step)
    for step in (4, 6):
        damage(store, f"checkpoints/{step:08d}/000001/{name}", how)
    assert_found(store, 2)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    for step, warning in zip((6, 4), warnings, strict=True):
        assert f"step {step} " in warning
        assert store.locate(f"checkpoints/{step:08d}/000001/{name}") in warning
    with pytest.raises(CorruptData, match=name):
        checkpoint.load_state(store, checkpoint.read(store, 6))


@pytest.mark.parametrize("how", ["truncated", "empty", "zeros", "other JSON"])
def test_a_damaged_commit_is_named_and_the_checkpoint_before_is_used(store, caplog, how):
    save(store, 2)
    save(store, 4)
    damage(store, f"checkpoints/{4:08d}.json", how)
    assert_found(store, 2)
    assert store.locate(f"checkpoints/{4:08d}.json") in caplog.text


def test_any_flipped_bit_of_a_commit_is_found(folder, caplog):
    """A commit says which step to continue from and with what configuration: nothing of it may change unseen."""
    caplog.set_level(logging.ERROR)
    save(folder, 2)
    save(folder, 4)
    path = folder.root / f"checkpoints/{4:08d}.json"
    data = path.read_bytes()
    body = data.index(b'"step"')  # what stands before, format and version, may also be refused as another format
    unseen = []
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            found, _ = checkpoint.newest(folder)
            outcome = found.step if found.meta == META else "other meta"
        except Exception as error:  # whatever it is, the run would end with it
            outcome = 2 if place < body and isinstance(error, UserError) else repr(error)
        if outcome != 2:
            line = data[: place + 1].decode().splitlines()[-1]
            unseen.append(f"{line.strip()}|: {outcome}")
    assert not unseen, f"{len(unseen)} of {len(data)}: {unseen}"


def test_if_all_are_damaged_there_is_none(store):
    for step in (2, 4):
        save(store, step)
        damage(store, f"checkpoints/{step:08d}/000001/state.safetensors", "one bit")
    assert checkpoint.newest(store) is None


@pytest.mark.parametrize("field", [{"version": 2}, {"format": "something-else"}])
def test_another_format_is_refused(store, field):
    """Not passed over: an older checkpoint than the user has would be continued without a word."""
    save(store, 2)
    save(store, 4)
    key = f"checkpoints/{4:08d}.json"
    store.write(key, stored._encode(json.loads(store.read(key))["commit"] | field))
    with pytest.raises(UserError) as caught:
        checkpoint.newest(store)
    assert store.locate(key) in str(caught.value)
    assert f"{stored.FORMAT} {stored.VERSION}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


class BadSectors(LocalStore):
    """A folder on a disk that does not give out what it has of some steps now: all, or all but the commits."""

    def __init__(self, uri, what, *steps):
        super().__init__(uri)
        self.bad = {key for step in steps for key in of(step) if what == "all" or not key.endswith(".json")}

    def read(self, key):
        if key in self.bad:
            raise OSError(errno.EIO, "Input/output error", key)
        return super().read(key)

    def write(self, key, data):
        super().write(key, data)
        self.bad.discard(key)  # on other sectors


@pytest.mark.parametrize("what", ["all", "files"])
def test_what_cannot_be_read_is_passed_over_and_left_alone(folder, caplog, what):
    for step in (2, 4, 6, 8):
        save(folder, step)
    store = BadSectors(folder.uri, what, 4, 8)
    assert_found(store, 6)
    assert "step 8 is damaged and is passed over" in caplog.text
    assert "cannot be read: Input/output error" in caplog.text
    save(folder, 1)
    save(store, 7, attempt=2, keep=3)
    assert files(store) == of(2) | of(4) | of(6) | of(7, 2) | of(8)  # it may be the cable, and not the disk
    plan = Retention(2).pruning(store)
    assert (plan.kept, plan.spared) == ([6, 7], [4, 8] if what == "all" else [8])
    assert_found(folder, 8)


@pytest.mark.parametrize("what", ["all", "files"])
def test_a_run_of_which_nothing_can_be_read_does_not_begin_anew(folder, what):
    save(folder, 2)
    save(folder, 4)
    with pytest.raises(Unreadable, match=f"{2:08d}"):
        checkpoint.newest(BadSectors(folder.uri, what, 2, 4))


@pytest.mark.parametrize("what", ["all", "files"])
def test_what_cannot_be_read_is_replaced_by_the_same_step(folder, what):
    """It may be the last step, without which a run never finishes."""
    save(folder, 4)
    store = BadSectors(folder.uri, what, 4)
    assert save(store, 4, attempt=2).error is None
    assert_found(store, 4, attempt=2)


# Pruning


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_are_kept(store, keep):
    writer = CheckpointWriter(store, begin_attempt(store, {}), Retention(keep), META)
    for step in (3, 6, 9, 12):
        writer.save(step, tensors(step))
    writer.wait()
    kept = (3, 6, 9, 12)[-keep:]
    assert files(store) == set().union(*(of(step) for step in kept))
    assert_found(store, 12)
    assert checkpoint.latest_attempt(store) == 1


def test_what_earlier_attempts_left_behind_is_deleted(store):
    save(store, 2, attempt=begin_attempt(store, {}))
    orphan = f"checkpoints/{9:08d}/000001/weights.safetensors"  # killed between a file and the commit
    store.write(orphan, b"half")
    attempt = begin_attempt(store, {})
    save(store, 4, attempt=attempt, keep=2)
    assert files(store) == of(2, 1) | of(4, 2)
    assert_found(store, 4, attempt)


def test_a_later_checkpoint_that_did_not_verify_is_deleted(store):
    """Else it would be the newest again, as soon as a new attempt had saved less steps."""
    for step in (2, 6):
        save(store, step, attempt=1)
    damage(store, f"checkpoints/{6:08d}/000001/weights.safetensors", "truncated")
    save(store, 4, attempt=2, keep=2)
    assert files(store) == of(2, 1) | of(4, 2)
    assert_found(store, 4, attempt=2)


def test_later_checkpoints_that_a_run_did_not_see_are_deleted_only_if_they_are_damaged(store, caplog):
    """A listing that left them out makes a run begin too early; it must not cost all that was trained."""
    for step in (6, 8, 10):
        save(store, step, attempt=1)
    damage(store, f"checkpoints/{10:08d}/000001/state.safetensors", "one bit")
    writer = CheckpointWriter(store, 2, Retention(2), META)
    for step in (1, 2, 3):
        writer.save(step, tensors(step))
    writer.wait()
    assert files(store) == of(2, 2) | of(3, 2) | of(6) | of(8)
    assert caplog.text.count("is good, but this start did not see it") == 2
    assert_found(store, 8)


@pytest.mark.parametrize("what", ["files", "commit"])
def test_a_damaged_checkpoint_of_the_same_step_is_replaced(store, what):
    save(store, 2, attempt=1)
    save(store, 4, attempt=1)
    key = {"files": f"checkpoints/{4:08d}/000001/state.safetensors", "commit": f"checkpoints/{4:08d}.json"}[what]
    damage(store, key, "truncated")
    save(store, 4, attempt=2)
    assert files(store) == of(2, 1) | of(4, 2)
    assert_found(store, 4, attempt=2)


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(store):
    """Two are to be kept: with 4 damaged, they are 2 and 6."""
    for step in (2, 4):
        save(store, step, attempt=1)
    damage(store, f"checkpoints/{4:08d}/000001/state.safetensors", "one bit")
    assert_found(store, 2)
    save(store, 6, attempt=2, keep=2)
    damage(store, f"checkpoints/{6:08d}/000002/state.safetensors", "one bit")
    assert checkpoint.newest(store) is not None


@pytest.mark.parametrize(
    ("keep_best", "scores", "kept"),
    [
        pytest.param(0, [9, 8, 7, 6, 5], [8, 10], id="none"),
        pytest.param(1, [5, 9, 7, 6, 8], [4, 8, 10], id="an old one"),
        pytest.param(2, [5, 9, 7, 6, 8], [4, 8, 10], id="two, one of them new"),
        pytest.param(3, [5, 9, 7, 6, 8], [4, 6, 8, 10], id="three"),
        pytest.param(1, [5, 9, 7, 6, 10], [8, 10], id="the newest"),
        pytest.param(1, [7, 7, 7, 5, 6], [6, 8, 10], id="equal: the latest of them"),
        pytest.param(2, [None, -20, None, None, None], [4, 8, 10], id="unscored ones are never best"),
        pytest.param(2, [math.nan, -20, math.nan, None, 1], [4, 8, 10], id="nor those whose score is no number"),
    ],
)
def test_the_newest_and_the_best_are_kept(store, keep_best, scores, kept):
    writer = CheckpointWriter(store, begin_attempt(store, {}), Retention(2, keep_best), META)
    for step, score in zip((2, 4, 6, 8, 10), scores, strict=True):
        writer.save(step, tensors(step), score)
    writer.wait()
    assert writer.error is None
    assert files(store) == set().union(*(of(step) for step in kept))


@pytest.mark.parametrize("how", ["missing", "truncated", "one bit"])
def test_a_damaged_best_one_is_not_kept_as_best(store, how):
    for step, score in ((2, 5), (4, 9), (6, 1)):
        save(store, step, score=score)
    damage(store, f"checkpoints/{4:08d}/000001/state.safetensors", how)
    save(store, 8, attempt=2, keep=1, keep_best=1, score=2)
    assert files(store) == of(2, 1) | of(8, 2)


@pytest.mark.parametrize("how", ["missing", "truncated"])
@pytest.mark.parametrize("what", [".json", "/000001/weights.safetensors"])
def test_what_is_damaged_after_it_was_verified_is_noticed_and_does_not_stop_the_pruning(store, what, how):
    writer = CheckpointWriter(store, 1, Retention(2, 1), META)
    for step, score in ((2, 5), (4, 9), (6, 1)):
        writer.save(step, tensors(step), score)
    writer.wait()
    damage(store, f"checkpoints/{4:08d}{what}", how)
    writer.save(8, tensors(8))
    writer.save(10, tensors(10))
    writer.wait()
    assert files(store) == of(8) | of(10) | of(6)  # 6 is the best of the good ones


class VanishingStore(LocalStore):
    """A folder in which a commit's files are lost as soon as the commit is there."""

    def create(self, key, data):
        created = super().create(key, data)
        for entry in self.list(key.removesuffix(".json") + "/") if key.startswith("checkpoints/") else []:
            super().delete([entry.key])
        return created


def test_nothing_is_deleted_if_the_newer_one_is_lost_after_it_was_verified(folder, caplog):
    save(folder, 2, keep=1)
    save(VanishingStore(folder.uri), 4, keep=1)
    assert "old checkpoints could not be deleted" in caplog.text
    assert of(2) <= files(folder)
    assert_found(folder, 2)


class OvertakenStore(LocalStore):
    """A folder in which another attempt begins, and saves, while an old one lists it to prune it."""

    def list(self, prefix=""):
        entries = super().list(prefix)
        if prefix == "checkpoints/" and checkpoint.steps(LocalStore(self.uri)) == [2, 4]:
            other = LocalStore(self.uri)
            save(other, 6, attempt=begin_attempt(other, {}))
        return entries


def test_an_attempt_that_is_overtaken_while_it_prunes_deletes_nothing_of_the_newer_one(folder):
    old = begin_attempt(folder, {})
    save(folder, 2, attempt=old)
    save(OvertakenStore(folder.uri), 4, attempt=old, keep=1)
    assert files(folder) == of(2) | of(4) | of(6, 2)


def test_what_is_no_part_of_a_checkpoint_is_left_alone(store):
    others = {"checkpoints/README.txt", "checkpoints/a/b/c", "checkpoints/00000002/notes/why.txt"}
    for key in others:
        store.write(key, b"mine")
    save(store, 2, keep=1)
    writer = save(store, 4, keep=1)
    assert writer.error is None
    assert files(store) == others | of(4)


class DyingStore(LocalStore):
    """A folder whose user is killed after the first call of delete."""

    def delete(self, keys):
        super().delete(keys)
        raise StorageError("killed")


def test_wherever_pruning_is_interrupted_no_commit_lacks_its_files(folder):
    for step in (2, 4, 6):
        save(folder, step)
    save(DyingStore(folder.uri), 8, keep=1)
    assert checkpoint.steps(folder) == [8]
    assert files(folder) > of(8)
    save(folder, 10, keep=1)
    assert files(folder) == of(10)


# Unfinished uploads

KILLED = """
import os, signal, sys, torch
from autopainter import checkpoint, storage
from autopainter.storage.s3 import shared_client

def die(params, **others):
    if params["body"] and params["url_path"].count("state.safetensors") and "partNumber=3" in str(params["url"]):
        os.kill(os.getpid(), signal.SIGKILL)

store = storage.open_store(sys.argv[1])
shared_client().meta.events.register("before-call.s3.UploadPart", die)
writer = checkpoint.CheckpointWriter(store, checkpoint.begin_attempt(store, {}), checkpoint.Retention(2), {})
writer.save(2, {"average.weight": torch.zeros(2), "generator.weight": torch.zeros(12 << 20)})
writer.wait()
print("saved", writer.error)
"""


def uploads(uri):
    """Keys of the unfinished uploads below a URI."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    pages = shared_client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    return sorted(entry["Key"].removeprefix(f"{prefix}/") for page in pages for entry in page.get("Uploads", ()))


def begin_upload(uri, key):
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    shared_client().create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{key}")


def test_the_upload_of_a_killed_attempt_is_aborted_by_the_next_one(runs_uri):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, runs_uri], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    state = f"checkpoints/{2:08d}/000001/state.safetensors"
    assert uploads(runs_uri) == [state]
    store = open_store(runs_uri)
    assert files(store) == {f"checkpoints/{2:08d}/000001/weights.safetensors"}

    writer = save(store, 2, attempt=begin_attempt(store, {}))
    assert writer.error is None
    assert uploads(runs_uri) == []
    assert files(store) == of(2, 2)


def test_only_uploads_of_checkpoints_and_of_no_later_attempt_are_aborted(runs_uri):
    def state(attempt):
        return f"checkpoints/{9:08d}/{attempt:06d}/state.safetensors"

    left = [state(3), "checkpoints/other", "events/000001/big"]
    for key in (state(1), state(1), state(2), *left):
        begin_upload(runs_uri, key)
    begin_upload(f"{runs_uri}-other", state(1))
    save(open_store(runs_uri), 4, attempt=2)
    assert uploads(runs_uri) == sorted(left)
    assert uploads(f"{runs_uri}-other") == [state(1)]


def test_many_uploads_are_aborted(runs_uri):
    """More than are listed at once."""
    store = open_store(runs_uri)
    count = 1010
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: begin_upload(runs_uri, f"checkpoints/{number}"), range(count)))
    seen = []
    store.abort_uploads("checkpoints/", lambda key: seen.append(key) or int(key.partition("/")[2]) >= 5)
    assert sorted(seen) == sorted(f"checkpoints/{number}" for number in range(count))
    assert uploads(runs_uri) == [f"checkpoints/{number}" for number in range(5)]


class Listing(http.server.BaseHTTPRequestHandler):
    """An S3 server that answers with each of ``script``, a status and a body; the last one repeats."""

    def do_GET(self):
        script = self.server.script
        status, body = script.pop(0) if len(script) > 1 else script[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def listing(s3, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        shared_client.cache_clear()
        yield server
        server.shutdown()
        thread.join()
    shared_client.cache_clear()


@pytest.mark.parametrize(
    ("status", "code"),
    [(501, "NotImplemented"), (405, "MethodNotAllowed"), (400, "InvalidArgument"), (403, "AccessDenied"), (404, "")],
)
def test_a_service_that_does_not_list_uploads_costs_a_debug_line(listing, caplog, status, code):
    caplog.set_level(logging.DEBUG, "autopainter")
    listing.script = [(status, f"<Error><Code>{code}</Code></Error>".encode())]
    open_store("s3://bucket/run").abort_uploads("checkpoints/", lambda key: True)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "s3://bucket/run/checkpoints/: unfinished uploads cannot be listed" in caplog.text


def test_a_service_that_is_busy_is_asked_again(listing, caplog):
    listing.script = [(503, b"<Error><Code>SlowDown</Code></Error>"), (200, b"<ListMultipartUploadsResult/>")]
    open_store("s3://bucket/run").abort_uploads("checkpoints/", lambda key: True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "trying again" in caplog.text


def test_a_folder_has_no_uploads(folder):
    folder.abort_uploads("checkpoints/", lambda key: pytest.fail(key))


class LossyStore(LocalStore):
    """A folder that loses the end of each file without a word."""

    def write(self, key, data):
        super().write(key, data[:-1])


def test_nothing_is_deleted_before_a_newer_one_is_verified(folder):
    save(folder, 2, keep=1)
    save(LossyStore(folder.uri), 4, keep=1)
    assert_found(folder, 2)


class UndeletingStore(LocalStore):
    """A folder in which nothing can be deleted."""

    def delete(self, keys):
        for key in keys:
            raise StorageError(f"{self.locate(key)}: 503 SlowDown")


def test_a_checkpoint_is_saved_even_if_older_ones_cannot_be_deleted(folder):
    """Else a run whose last step is committed would end with an error."""
    save(folder, 2, keep=1)
    reports = []
    writer = save(UndeletingStore(folder.uri), 4, keep=1, report=lambda *report: reports.append(report))
    assert_found(folder, 4)
    assert [(step, error) for step, _, error in reports] == [(4, None)]
    assert writer.error is None


# Attempts


def test_attempts_are_numbered_and_say_what_they_are(store):
    assert [begin_attempt(store, {"step": step, "workers": 2}) for step in (0, 40)] == [1, 2]
    assert checkpoint.latest_attempt(store) == 2
    record = json.loads(store.read("attempts/000002.json"))
    assert record.pop("started") > 1.7e9
    assert len(record.pop("id")) == 32
    assert record == {"attempt": 2, "step": 40, "workers": 2}


def test_attempts_that_begin_at_once_get_different_numbers(store):
    count = 6
    together = threading.Barrier(count)

    def begin(_):
        together.wait(30)
        return begin_attempt(store, {"step": 0})

    with ThreadPoolExecutor(count) as threads:
        assert sorted(threads.map(begin, range(count))) == list(range(1, count + 1))


def test_an_older_attempt_is_fenced_out(store, caplog):
    old = begin_attempt(store, {})
    save(store, 2, attempt=old)
    new = begin_attempt(store, {})
    reports = []
    writer = save(store, 4, attempt=old, keep=1, report=lambda *report: reports.append(report))
    assert isinstance(writer.error, Superseded)
    assert f"attempt {new} has taken over" in str(writer.error)
    assert [(step, error) for step, _, error in reports] == [(4, writer.error)]
    assert "step 4" in caplog.text
    assert checkpoint.steps(store) == [2]
    assert_found(store, 2, old)
    save(store, 3, attempt=new)
    assert files(store) == of(2, old) | of(3, new)  # what the old one wrote in vain is gone


def test_an_attempt_that_is_overtaken_while_it_writes_does_not_commit(store):
    writer = CheckpointWriter(store, begin_attempt(store, {}), Retention(1), META)
    writer.save(2, tensors(2))
    writer.save(4, tensors(4), before_commit=lambda: begin_attempt(store, {}))
    writer.wait()
    assert isinstance(writer.error, Superseded)
    assert checkpoint.steps(store) == [2]
    assert_found(store, 2)


def test_two_attempts_that_overlap_do_not_mix_their_files(store):
    """The new one has saved a step, and the old one, still dying, writes its own files of the same step."""
    old, new = begin_attempt(store, {}), begin_attempt(store, {})
    save(store, 4, attempt=new)
    late = CheckpointWriter(store, old, Retention(1), META)
    late.save(4, tensors(5))
    late.wait()
    assert late.error is not None
    assert_found(store, 4, new)


# Storage that refuses


@pytest.fixture
def refusing(tmp_path):
    """A run in a folder that cannot be written to until the file in its place is gone."""
    (tmp_path / "run").mkdir()
    obstacle = tmp_path / "run" / "checkpoints"
    obstacle.write_text("in the way")
    return LocalStore(str(tmp_path / "run")), obstacle


def test_training_goes_on_when_storage_refuses(refusing, caplog):
    store, obstacle = refusing
    reports = []
    writer = CheckpointWriter(store, 1, Retention(9), META, report=lambda *report: reports.append(report))
    writer.save(2, tensors(2))
    writer.wait()
    assert obstacle.name in str(writer.error)
    assert "step 2 could not be saved" in caplog.text

    obstacle.unlink()
    writer.save(4, tensors(4))
    writer.wait()
    assert writer.error is None
    assert [(step, error is None) for step, _, error in reports] == [(2, False), (4, True)]
    assert_found(store, 4)


def test_a_bucket_that_is_gone_is_an_error_that_training_survives(s3, caplog):
    reports = []
    store = open_store("s3://no-such-bucket/run")
    writer = save(store, 2, report=lambda *report: reports.append(report))
    assert isinstance(writer.error, UserError)
    assert "no-such-bucket" in str(writer.error)
    assert [(step, error) for step, _, error in reports] == [(2, writer.error)]
    assert "no-such-bucket" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_error_of_the_writing_thread_is_lost(folder):
    """Else a run would end as if its last state were saved."""

    def fail():
        raise RuntimeError("not foreseen")

    reports = []
    writer = CheckpointWriter(folder, 1, Retention(9), META, report=lambda *report: reports.append(report))
    writer.save(2, tensors(2), before_commit=fail)
    writer.wait()
    assert checkpoint.steps(folder) == []
    assert "not foreseen" in str(writer.error)
    assert len(reports) == 1


class OvertakenAtCommitStore(LocalStore):
    """A folder in which a later attempt commits the same step just before the first commit of this one."""

    overtake = None

    def create(self, key, data):
        if self.overtake and key.startswith("checkpoints/"):
            overtake, self.overtake = self.overtake, None
            overtake()
        return super().create(key, data)


def test_an_attempt_that_is_overtaken_just_before_its_commit_harms_nothing(tmp_path):
    store = OvertakenAtCommitStore(str(tmp_path))
    late = CheckpointWriter(store, begin_attempt(store, {}), Retention(1), META)

    def overtake():
        new = begin_attempt(store, {})
        save(store, 4, attempt=new, keep=1)
        assert_found(store, 4, new)

    store.overtake = overtake
    late.save(4, tensors(4))
    late.wait()
    assert isinstance(late.error, Superseded)
    assert_found(store, 4, 2)


def test_a_state_of_other_tensors_is_saved_whole(folder):
    writer = save(folder, 2)
    other = {"average.other": torch.arange(5), **tensors(4)}
    del other["average.conv.bias"]
    other["generator.conv.weight"] = torch.ones(3, dtype=torch.float64)
    writer.save(4, other)
    writer.wait()
    _, state = checkpoint.newest(folder)
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in other.items())


class SpoilingStore(LocalStore):
    """A folder that changes a bit of what is written, when told to."""

    spoils = False

    def write(self, key, data):
        super().write(key, data[:-1] + bytes([data[-1] ^ 1]) if self.spoils else data)


def test_what_storage_spoils_is_not_committed_and_costs_no_older_checkpoint(tmp_path):
    store = SpoilingStore(str(tmp_path))
    save(store, 2, keep=1)
    store.spoils = True
    writer = save(store, 4, keep=1)
    assert isinstance(writer.error, CorruptData)
    assert checkpoint.steps(store) == [2]
    assert_found(store, 2)
