"""TensorBoard events as TensorBoard itself reads them, over restarts, and the Prometheus endpoint over HTTP.

Reference: TensorBoard's own event accumulators and prometheus_client's parser.
Run: pytest tests/test_telemetry.py
"""

import errno
import io
import itertools
import logging
import shutil
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import PIL.Image
import pytest
from prometheus_client.parser import text_string_to_metric_families
from services import HOST, free_ports
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autopainter.data import manifest
from autopainter.data.stream import TrainingStream
from autopainter.errors import StorageError, UserError
from autopainter.storage import LocalStore, open_store, retries
from autopainter.storage.retry import Transient, retry
from autopainter.telemetry.events import EventWriter
from autopainter.telemetry.metrics import Metrics

NEVER = 1e6


def until(condition):
    """Wait until a condition holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# TensorBoard


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
    assert "could not be uploaded" in caplog.text
    assert "a new file is begun" in caplog.text
    assert curve(read(folder))[-1] == (29, 29)


def test_a_folder_that_cannot_be_written_to_is_a_warning(folder, caplog):
    folder.root.mkdir()
    (folder.root / "events").write_text("in the way")
    writer = EventWriter(folder, 1, 0, NEVER)
    writer.scalars({"generator/loss": 1.0}, 1)
    writer.upload()
    assert "could not be uploaded" in caplog.text
    writer.close()


# Prometheus

STREAMED = [
    (f"autopainter_{name}",)
    for name in ("data_wait_seconds_total", "data_read_bytes_total", "data_cache_hits_total", "data_cache_misses_total",
                 "storage_retries_total", "data_ready_batches", "data_held_bytes")
]  # fmt: skip


def fetch(port):
    """The samples that the endpoint serves: (name, labels) -> value."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{HOST}:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                assert sample.labels.pop("run") == "minions"
                samples[sample.name, *sample.labels.values()] = sample.value
    return samples


@pytest.fixture
def endpoint():
    """A port, and the metrics that it serves."""
    (port,) = free_ports(1)
    metrics = Metrics("minions", port)
    yield port, metrics
    metrics.close()


def test_the_endpoint_serves_what_was_measured(endpoint):
    port, metrics = endpoint
    before = time.time()
    metrics.logged(40, {"generator/loss": 2.5, "discriminator/loss": 0.5}, 12.25)
    metrics.images.inc(320)
    metrics.images.inc(16)
    metrics.checkpointed(38, 1.5, None)
    metrics.started(3, {"killed": 2}, 1)
    metrics.stepped_down(1)
    samples = fetch(port)
    times = [samples.pop((f"autopainter_last_{what}_timestamp_seconds",)) for what in ("step", "checkpoint")]
    assert all(before <= moment <= time.time() for moment in times)
    assert samples == {
        ("autopainter_loss", "generator/loss"): 2.5,
        ("autopainter_loss", "discriminator/loss"): 0.5,
        ("autopainter_step",): 40,
        ("autopainter_images_total",): 336,
        ("autopainter_images_per_second",): 12.25,
        ("autopainter_checkpoint_step",): 38,
        ("autopainter_checkpoint_seconds",): 1.5,
        ("autopainter_checkpoint_failures_total",): 0,
        ("autopainter_attempt",): 3,
        ("autopainter_stops", "killed"): 2,
        ("autopainter_stops", "gpu memory"): 1,
        ("autopainter_memory_rung",): 2,
        **dict.fromkeys(STREAMED, 0),
    }


def test_what_the_stream_does_is_counted(endpoint, dataset, small, tmp_path):
    port, metrics = endpoint
    counted = retries()
    data = small.data.model_copy(update={"cache": str(tmp_path)})
    stream = TrainingStream(manifest.load(dataset), small.model_copy(update={"data": data}), 0, 1, 0)
    for _ in range(2):
        list(itertools.islice(stream, 12))
        metrics.streamed(stream)
        samples = fetch(port)
        assert samples["autopainter_data_wait_seconds_total",] == stream.wait_seconds > 0
        assert samples["autopainter_storage_retries_total",] == counted
        assert samples["autopainter_data_held_bytes",] > 0
        assert 0 <= samples["autopainter_data_ready_batches",] <= small.data.prefetch_batches
    stream.close()
    metrics.streamed(stream)
    samples = fetch(port)
    assert samples["autopainter_data_read_bytes_total",] == stream.split.bytes_read > 0
    assert samples["autopainter_data_cache_hits_total",] == stream.split.cache.hits > 0
    assert samples["autopainter_data_cache_misses_total",] == stream.split.cache.misses > 0


def test_repeated_attempts_are_counted():
    failures = iter([Transient("slow down"), Transient("slow down")])

    def attempt():
        for failure in failures:
            raise failure

    before = retries()
    retry(attempt)
    assert retries() == before + 2


def test_a_failed_checkpoint_is_counted_and_the_last_good_one_stands(endpoint):
    port, metrics = endpoint
    metrics.checkpointed(38, 1.5, None)
    good = fetch(port)
    metrics.checkpointed(40, 9.0, StorageError("full"))
    changed = {name: value for name, value in fetch(port).items() if value != good[name]}
    assert changed == {("autopainter_checkpoint_failures_total",): 1}


def test_two_runs_in_one_process_do_not_meet(endpoint):
    port, metrics = endpoint
    metrics.step.set(5)
    other = Metrics("minions", 0)
    other.step.set(7)
    assert fetch(port)["autopainter_step",] == 5
    other.close()


def test_a_taken_port_is_a_warning(endpoint, caplog):
    port, metrics = endpoint
    second = Metrics("minions", port)
    assert "telemetry.prometheus_port" in caplog.text
    assert str(port) in caplog.text
    second.logged(3, {"generator/loss": 1.0}, 1.0)
    second.checkpointed(3, 1.0, None)
    second.close()
    metrics.step.set(5)
    assert fetch(port)["autopainter_step",] == 5  # the first one still serves


def test_without_a_port_nothing_is_opened():
    threads = set(threading.enumerate())
    metrics = Metrics("minions", 0)
    assert set(threading.enumerate()) == threads
    metrics.logged(3, {"generator/loss": 1.0}, 1.0)
    metrics.close()


def test_close_frees_the_port():
    (port,) = free_ports(1)
    for step in range(2):
        metrics = Metrics("minions", port)
        metrics.step.set(step)
        assert fetch(port)["autopainter_step",] == step
        metrics.close()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections may linger
        probe.bind((HOST, port))
    with pytest.raises(urllib.error.URLError):
        fetch(port)
