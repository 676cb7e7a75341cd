"""TensorBoard events as TensorBoard itself reads them, over restarts.

Reference: TensorBoard's own event accumulators.
Run: pytest tests/test_events.py
"""

import contextlib
import errno
import io
import logging
import shutil
import tempfile
import threading

import numpy as np
import PIL.Image
import pytest
from google.protobuf.json_format import MessageToDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from waiting import until

from autopainter.errors import StorageError, UserError
from autopainter.storage import LocalStore, open_store
from autopainter.telemetry.events import EventWriter

NEVER = 1e6


@pytest.fixture
def run(store):
    return store


def attempt(run, start_step, steps, value, pictures=()):
    """One start of a run that shows ``value`` at some steps."""
    writer = EventWriter(run, len(run.list("events/")) + 1, start_step, NEVER)
    for step in steps:
        writer.scalars({"generator/loss": value + step, "progress/images": 8 * step}, step)
        if step in pictures:
            writer.picture("validation", np.full((4, 6, 3), value, np.uint8), step)
    writer.close()


@pytest.fixture
def read(tmp_path):
    """Reads a run's events as TensorBoard does."""

    def load(run):
        copies = tmp_path / "copies"
        copies.mkdir()
        for entry in run.list("events/"):
            (copies / entry.key.removeprefix("events/")).write_bytes(run.read(entry.key))
        return EventAccumulator(str(copies), size_guidance={"scalars": 0, "images": 0}).Reload()

    return load


def curve(events, tag="generator/loss"):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_scalars_and_pictures_are_read_back(run, read):
    writer = EventWriter(run, 1, 0, NEVER)
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    for step in (10, 20):
        writer.scalars({"generator/loss": step / 4, "discriminator/loss": 0.5}, step)
    writer.picture("validation", picture, 20)
    writer.close()
    assert all("tfevents" in entry.key for entry in run.list("events/"))
    events = read(run)
    assert curve(events) == [(10, 2.5), (20, 5.0)]
    assert curve(events, "discriminator/loss") == [(10, 0.5), (20, 0.5)]
    (image,) = events.Images("validation")
    assert image.step == 20
    assert (np.asarray(PIL.Image.open(io.BytesIO(image.encoded_image_string))) == picture).all()


@pytest.mark.parametrize("saved", [0, 4, 6], ids="killed at step 6, last saved at {}".format)
def test_a_resumed_run_shows_each_step_once(folder, read, saved):
    """What the first attempt showed beyond the checkpoint that the second one began with is replaced."""
    attempt(folder, 0, range(1, 7), value=100, pictures=(2, 4, 6))
    attempt(folder, saved, range(saved + 1, 9), value=200, pictures=(2, 4, 6, 8))
    expected = {step: 100 if step <= saved else 200 for step in range(1, 9)}
    events = read(folder)
    assert curve(events) == [(step, value + step) for step, value in expected.items()]
    assert curve(events, "progress/images") == [(step, 8 * step) for step in expected]
    pictures = [
        (image.step, np.asarray(PIL.Image.open(io.BytesIO(image.encoded_image_string))).mean())
        for image in events.Images("validation")
    ]
    assert pictures == [(step, expected[step]) for step in (2, 4, 6, 8)]


def test_three_attempts_give_one_curve(folder, read):
    attempt(folder, 0, range(1, 6), value=100)
    attempt(folder, 4, range(5, 9), value=200)
    attempt(folder, 2, range(3, 7), value=300)  # the checkpoints of 3 and later turned out to be damaged
    assert curve(read(folder)) == [(1, 101), (2, 102), (3, 303), (4, 304), (5, 305), (6, 306)]


def test_events_are_uploaded_on_the_timer(run):
    writer = EventWriter(run, 1, 0, 0.05)
    writer.scalars({"generator/loss": 1.0}, 1)
    until(lambda: run.list("events/"))
    ((key, size),) = [(entry.key, entry.bytes) for entry in run.list("events/")]
    writer.scalars({"generator/loss": 1.0}, 2)
    until(lambda: run.size(key) > size)
    writer.close()
    assert len(run.list("events/")) == 1


def test_upload_sends_what_was_recorded_until_then_and_only_what_is_new(folder, read):
    writer = EventWriter(folder, 1, 0, NEVER)
    writer.scalars({"generator/loss": 1.0}, 1)
    assert folder.list("events/") == []
    writer.upload()
    (path,) = (folder.root / "events").iterdir()
    assert curve(read(folder)) == [(1, 1.0)]
    before = path.stat()
    writer.upload()
    assert path.stat().st_ino == before.st_ino  # each upload of a file makes a new one
    writer.close()


def test_close_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    threads = set(threading.enumerate())
    writer = EventWriter(folder, 1, 0, NEVER)
    writer.scalars({"generator/loss": 1.0}, 1)
    assert list(scratch.iterdir())
    writer.close()
    assert not list(scratch.iterdir())
    until(lambda: set(threading.enumerate()) <= threads)


def test_events_that_cannot_be_uploaded_are_a_warning(s3, caplog):
    writer = EventWriter(open_store("s3://no-such-bucket/run"), 1, 0, NEVER)
    writer.scalars({"generator/loss": 1.0}, 1)
    writer.upload()
    writer.close()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings
    assert all("no-such-bucket" in record.getMessage() for record in warnings)


class FailingStore(LocalStore):
    """A folder whose first write fails."""

    error = None

    def write(self, key, data):
        if self.error:
            error, self.error = self.error, None
            raise error
        super().write(key, data)


@pytest.mark.parametrize(
    "error",
    [StorageError("503 SlowDown"), UserError("refused"), OSError(errno.ENOSPC, "No space left on device")],
    ids=["server", "user", "full-disk"],
)
def test_an_upload_that_failed_is_a_warning_and_made_up_for(tmp_path, read, caplog, error):
    """Saving a checkpoint uploads the events: what fails here would end a run or cost it a checkpoint."""
    run = FailingStore(str(tmp_path / "run"))
    run.error = error
    writer = EventWriter(run, 1, 0, NEVER)
    writer.scalars({"generator/loss": 1.0}, 1)
    writer.upload()
    assert str(error) in caplog.text
    assert run.list("events/") == []
    writer.upload()
    assert curve(read(run)) == [(1, 1.0)]
    writer.close()


def test_what_is_kept_here_does_not_grow_with_the_run(run, read, monkeypatch):
    """Pictures of noise, of which a few fill a file; each point is shown once and in order all the same."""
    monkeypatch.setattr("autopainter.telemetry.events.FILE_BYTES", 50_000)
    noise = np.random.default_rng(0)
    writer = EventWriter(run, 1, 0, NEVER)
    for step in range(1, 41):
        writer.scalars({"generator/loss": float(step)}, step)
        writer.picture("validation", noise.integers(0, 255, (60, 60, 3), np.uint8), step)
        writer.upload()
        assert sum(path.stat().st_size for path in writer._local()) < 75_000
    writer.close()
    files = run.list("events/")
    assert len(files) > 5
    assert max(entry.bytes for entry in files) < 75_000
    shown = read(run)
    assert curve(shown) == [(step, step) for step in range(1, 41)]
    assert [event.step for event in shown.Images("validation")][-1] == 40


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the writer's own thread
def test_a_local_file_that_is_swept_away_ends_nothing(folder, read, caplog):
    writer = EventWriter(folder, 1, 0, NEVER)
    writer.upload()
    shutil.rmtree(writer._folder.path)
    for step in range(1, 30):
        writer.scalars({"generator/loss": float(step)}, step)
        writer.upload()
    writer.close()
    assert "a new file is begun" in caplog.text
    assert curve(read(folder))[-1] == (29, 29)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the writer's own thread
@pytest.mark.parametrize("full_from", [0, 8], ids=["from the beginning", "from step 8 on"])
def test_a_full_disk_costs_what_it_cannot_hold_and_one_warning(
    folder, read, small_disk, monkeypatch, caplog, full_from
):
    """An earlier start showed steps 5 and 6, which this one does again."""
    caplog.set_level(logging.INFO, "autopainter")
    noise = np.random.default_rng(0)
    attempt(folder, 0, range(1, 7), value=100)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))

    def fill():
        with contextlib.suppress(OSError), (small_disk / "other").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    if not full_from:
        fill()
    writer = EventWriter(folder, 2, 4, NEVER)
    for step in range(5, 13):
        if step == full_from:
            writer.upload()
            fill()
        writer.scalars({"generator/loss": 200.0 + step}, step)
        writer.picture("validation", noise.integers(0, 255, (60, 60, 3), np.uint8), step)
        if step >= full_from:
            writer.upload()
    (small_disk / "other").unlink()
    writer.upload()
    for step in range(13, 20):
        writer.scalars({"generator/loss": 200.0 + step}, step)
    writer.close()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "TensorBoard events are lost until they can be written here again: [Errno 28]" in caplog.text
    kept = [(step, 100 + step) for step in range(1, 5)] + [(step, 200 + step) for step in range(5, full_from)]
    shown = [point for point in curve(read(folder)) if not full_from or point[0] not in range(full_from, 13)]  # it fits
    assert shown == kept + [(step, 200 + step) for step in range(13, 20)]
    assert not list(small_disk.iterdir())


def test_a_folder_that_cannot_be_written_to_is_a_warning(folder, caplog):
    folder.root.mkdir()
    (folder.root / "events").write_text("in the way")
    writer = EventWriter(folder, 1, 0, NEVER)
    writer.scalars({"generator/loss": 1.0}, 1)
    writer.upload()
    assert "could not be uploaded" in caplog.text
    writer.close()


def test_the_configuration_is_shown_as_text_and_as_hyperparameters(folder, read, small):
    for start, steps in ((0, 12), (12, 24)):
        changed = small.model_copy(update={"train": small.train.model_copy(update={"steps": steps})})
        writer = EventWriter(folder, 1 + bool(start), start, NEVER)
        writer.configuration(changed, start)
        writer.close()
    events = read(folder)
    texts = [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events.Tensors("configuration/text_summary")
    ]
    assert [step for step, _ in texts] == [0, 12]
    assert "  steps: 24\n" in texts[1][1]
    about = HParamsPluginData.FromString(events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content)
    values = {name: MessageToDict(value) for name, value in about.session_start_info.hparams.items()}
    assert values["model.norm"] == "instance"
    assert values["data.image_size"] == 32
    assert not any("access" in name or "storage" in name for name in values)
