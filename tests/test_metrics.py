"""What a worker records of itself and of its run, as its endpoint serves it.

Reference: prometheus_client's parser, and promtool of Debian's package prometheus. Run: pytest tests/test_metrics.py
"""

import itertools
import mmap
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import HOST, free_ports
from scraping import Samples, check, collect, exposition, get, parse
from waiting import PATIENCE_SECONDS, until

from autopainter import config as configuration
from autopainter import journal, loop, losses, parallel, storage
from autopainter.cgroup import Groups
from autopainter.config import Config
from autopainter.data import manifest
from autopainter.data.stream import TrainingStream
from autopainter.errors import Diverged, StorageError
from autopainter.host import Host
from autopainter.storage.retry import Transient, retry
from autopainter.telemetry import memory_use
from autopainter.telemetry import metrics as recording
from autopainter.telemetry.metric_list import METRICS
from autopainter.telemetry.metrics import Metrics
from autopainter.trainer import SCALARS

CPU = torch.device("cpu")

# Memory


def test_memory_of_a_container_with_a_limit(tmp_path: Path) -> None:
    limit, used = 200 << 20, 150 << 20
    (tmp_path / "own").write_text("1:memory:/\n0::/\n")
    for name, text in (("memory.max", limit), ("memory.current", used),
                       ("memory.stat", f"anon 1\ninactive_file {30 << 20}\nactive_file 7")):  # fmt: skip
        (tmp_path / name).write_text(f"{text}\n")
    assert memory_use.host(Groups(tmp_path, tmp_path / "own")) == (120 << 20, limit)
    old = tmp_path / "version1"
    (old / "memory").mkdir(parents=True)
    for name, text in (("limit_in_bytes", limit), ("usage_in_bytes", used),
                       ("stat", f"cache 9\ntotal_inactive_file {30 << 20}")):  # fmt: skip
        (old / "memory" / f"memory.{name}").write_text(f"{text}\n")
    assert memory_use.host(Groups(old, tmp_path / "own")) == (120 << 20, limit)
    (tmp_path / "memory.max").write_text("max\n")
    used_here, total = memory_use.host(Groups(tmp_path, tmp_path / "own"))
    assert 0 < used_here < total
    assert total > limit


def test_memory_of_this_process_grows_with_it() -> None:
    before = memory_use.resident()
    with mmap.mmap(-1, 512 << 20) as held:  # not from malloc, which may have such memory left from tests before
        held.write(bytes(512 << 20))
        assert memory_use.resident() - before > 256 << 20


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_use.gpu(CPU) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 55)
    assert memory_use.gpu(torch.device("cuda", 1)) == (70, 100, 55)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_memory_of_a_real_gpu() -> None:
    held = torch.ones(64 << 20, device="cuda")
    used, total, peak = memory_use.gpu(held.device) or (0, 0, 0)
    assert 256 << 20 <= peak <= used <= total


# What a worker records


@pytest.fixture
def watched(small: Config, tmp_path: Path) -> Config:
    """The small run, with a port and a folder for its metrics."""
    (port,) = free_ports(1)
    telemetry = {"prometheus_port": port, "prometheus_host": HOST, "metrics_folder": str(tmp_path / "metrics")}
    return small.model_copy(update={"telemetry": small.telemetry.model_copy(update=telemetry)})


@pytest.fixture
def began() -> float:
    """A time before anything of the test."""
    return time.time()


@pytest.fixture
def metrics(began: float, watched: Config) -> Iterator[Metrics]:
    made = Metrics(watched, CPU, 1.0, 0)
    yield made
    made.close()


def scrape(config: Config) -> Samples:
    """What the endpoint of a run serves, without the label of the run."""
    samples = parse(get(config.telemetry.prometheus_port))
    assert {key[1] for key in samples} == {config.run.name}
    return {(key[0].removeprefix("autopainter_"), *key[2:]): value for key, value in samples.items()}


def test_the_endpoint_serves_what_was_measured(watched: Config, began: float, metrics: Metrics) -> None:
    values = dict(zip(SCALARS, range(len(SCALARS)), strict=True))
    metrics.started(3, {"killed": 2}, 1)
    metrics.logged(values, 12.25, {"generator": 2e-4, "discriminator": 1e-4})
    metrics.stalled(0.25)
    metrics.stalled(0.5)
    metrics.stepped_down(1)
    metrics.not_finite()
    metrics.checkpointed(38, 1.5, None)
    samples = scrape(watched)
    for moment in ("last_step", "last_checkpoint"):
        ranks = ("0",) if moment == "last_step" else ()
        assert began < samples.pop((f"{moment}_timestamp_seconds", *ranks)) <= time.time()
    losses = {("loss", name): value for name, value in values.items()
              if not name.endswith(("accuracy_real", "accuracy_fake", "gradient_norm"))}  # fmt: skip
    assert len(losses) == 6
    kinds = ("killed", "preempted", "host memory", "hang", "storage", "error", "diverged", "stopped", "superseded")
    assert samples == {
        **losses,
        ("discriminator_accuracy_ratio", "real"): values["discriminator/accuracy_real"],
        ("discriminator_accuracy_ratio", "fake"): values["discriminator/accuracy_fake"],
        ("gradient_norm", "generator"): values["generator/gradient_norm"],
        ("gradient_norm", "discriminator"): values["discriminator/gradient_norm"],
        ("learning_rate", "generator"): 2e-4,
        ("learning_rate", "discriminator"): 1e-4,
        ("step",): 0,
        ("target_steps",): watched.train.steps,
        ("workers",): 1,
        ("images_total",): 0,
        ("images_per_second",): 12.25,
        ("not_finite_steps_total",): 1,
        ("checkpoint_step",): 38,
        ("checkpoint_seconds",): 1.5,
        ("checkpoint_stall_seconds_total",): 0.75,
        ("checkpoint_failures_total",): 0,
        ("checkpoint_max_age_seconds",): watched.checkpoint.max_age_seconds,
        ("attempt",): 3,
        ("memory_rung",): 2,
        ("last_end_timestamp_seconds",): 0,
        **{("stops_total", kind): 0 for kind in kinds},
        ("stops_total", "killed"): 2,
        ("stops_total", "gpu memory"): 1,
    }


def test_a_failed_checkpoint_is_counted_and_the_last_good_one_stands(watched: Config, metrics: Metrics) -> None:
    metrics.checkpointed(38, 1.5, None)
    good = scrape(watched)
    metrics.checkpointed(40, 9.0, StorageError("full"))
    changed = {name: value for name, value in scrape(watched).items() if value != good[name]}
    assert changed == {("checkpoint_failures_total",): 1}


def test_what_the_stream_does_is_counted(watched: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recording, "LOOK_SECONDS", 0)
    metrics = Metrics(watched, CPU, 1.0, 0)
    data = watched.data.model_copy(update={"cache": str(tmp_path / "cache")})
    cached = watched.model_copy(update={"data": data})
    stream = TrainingStream(manifest.load(watched.data.manifest), cached, 0, 1, 0)
    for done in (12, 24):
        list(itertools.islice(stream, 12))
        metrics.step_done(done, stream)
        samples = scrape(watched)
        assert samples["data_wait_seconds_total", "0"] == pytest.approx(stream.wait_seconds)
        assert samples["data_held_bytes", "0"] > 0
        assert 0 <= samples["data_ready_batches", "0"] <= watched.data.prefetch_batches
        assert 0 < samples["resident_memory_bytes", "0"] < samples["host_memory_total_bytes", "0"]
        assert 0 < samples["host_memory_used_bytes", "0"] <= samples["host_memory_total_bytes", "0"]
        assert samples["step",] == done
        assert samples["images_total",] == done * watched.train.global_batch
    stream.close()
    metrics.streamed(stream)
    metrics.checkpointed(24, 1.0, None)
    samples = scrape(watched)
    assert samples["data_read_bytes_total", "0"] == stream.split.bytes_read > 0
    assert stream.split.cache is not None
    assert samples["data_cache_hits_total", "0"] == stream.split.cache.hits > 0
    assert samples["data_cache_misses_total", "0"] == stream.split.cache.misses > 0
    assert not [name for name in samples if name[0].startswith("gpu")]
    metrics.close()


def test_repeated_and_failed_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = iter([Transient("slow down"), Transient("slow down")])

    def recovers() -> None:
        for failure in attempts:
            raise failure

    def fails() -> None:
        raise StorageError("no such upload")

    before = storage.retries(), storage.failures()
    retry(recovers)
    assert (storage.retries(), storage.failures()) == (before[0] + 2, before[1])
    with pytest.raises(StorageError):
        retry(fails)
    assert storage.failures() == before[1] + 1
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(StorageError):
        retry(fails, cancelled)
    assert storage.failures() == before[1] + 1


def test_the_images_of_a_run_continued_from_an_earlier_step_never_go_down(watched: Config) -> None:
    images = []
    for begun, steps in ((1.0, (0, 1, 2, 3, 4)), (2.0, (2, 3, 4, 5, 6))):
        for done in steps:
            metrics = Metrics(watched, CPU, begun, done)
            images.append(scrape(watched)["images_total",])
            assert scrape(watched)["step",] == done
            metrics.close()
    batch = watched.train.global_batch
    assert images == [batch * steps for steps in (0, 1, 2, 3, 4, 4, 4, 4, 5, 6)]


def test_a_worker_that_is_not_the_first_records_its_own_and_serves_nothing(
    watched: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    metrics = Metrics(watched, CPU, 1.0, 5)
    with pytest.raises(urllib.error.URLError):
        get(watched.telemetry.prometheus_port)
    assert watched.telemetry.metrics_folder
    recorded = collect(Path(watched.telemetry.metrics_folder))
    assert list(recorded) == [("autopainter_last_step_timestamp_seconds", "small", "1")]
    metrics.close()


def test_the_first_worker_of_another_machine_serves_it(watched: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "rank", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "0")
    metrics = Metrics(watched, CPU, 1.0, 5)
    assert ("last_step_timestamp_seconds", "8") in scrape(watched)
    metrics.close()


def test_a_taken_port_is_a_warning_and_is_taken_once_it_is_free(
    watched: Config, metrics: Metrics, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    metrics.started(1, {}, 0)
    elsewhere = watched.telemetry.model_copy(update={"metrics_folder": str(tmp_path / "elsewhere")})
    other = Metrics(watched.model_copy(update={"telemetry": elsewhere}), CPU, 1.0, 0)
    other.started(7, {}, 0)
    assert caplog.text.count("telemetry.prometheus_port") == 1
    assert str(watched.telemetry.prometheus_port) in caplog.text
    assert scrape(watched)["attempt",] == 1  # the first one still serves
    metrics.close()
    other.started(8, {}, 0)
    assert scrape(watched)["attempt",] == 8
    other.close()


def test_a_folder_that_cannot_be_made_is_a_warning(watched: Config, caplog: pytest.LogCaptureFixture) -> None:
    assert watched.telemetry.metrics_folder
    Path(watched.telemetry.metrics_folder).write_text("in the way")
    metrics = Metrics(watched, CPU, 1.0, 0)
    metrics.checkpointed(3, 1.0, None)
    metrics.close()
    assert "no metrics" in caplog.text


def test_without_a_port_and_a_folder_nothing_is_opened(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = set(threading.enumerate())
    metrics = Metrics(small, CPU, 1.0, 0)
    metrics.checkpointed(3, 1.0, None)
    assert set(threading.enumerate()) <= threads
    assert list(tmp_path.iterdir()) == []
    metrics.close()


def test_close_frees_the_port_and_ends_the_threads(watched: Config) -> None:
    threads = set(threading.enumerate())
    for step in range(2):
        metrics = Metrics(watched, CPU, 1.0, step)
        assert scrape(watched)["step",] == step
        metrics.close()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections may linger
        probe.bind((HOST, watched.telemetry.prometheus_port))
    with pytest.raises(urllib.error.URLError):
        get(watched.telemetry.prometheus_port)
    until(lambda: set(threading.enumerate()) <= threads)


# A run in this process


def settings(small_settings: list[str], place: Path, *changes: str) -> Config:
    return configuration.load(None, [*small_settings, f"run.storage={place}", *changes], environment={})


def test_a_run_leaves_its_last_values_in_a_folder_that_was_named(small_settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    config = settings(small_settings, tmp_path / "runs", "train.steps=3", f"telemetry.metrics_folder={folder}")
    before = time.time()
    assert loop.train(config, CPU).why == "finished"
    samples = collect(folder)
    assert samples["autopainter_step", "small"] == 3
    assert samples["autopainter_images_total", "small"] == 24
    assert samples["autopainter_checkpoint_step", "small"] == 3
    assert samples["autopainter_attempt", "small"] == 1
    assert samples["autopainter_learning_rate", "small", "generator"] == config.train.learning_rate
    assert samples["autopainter_data_read_bytes_total", "small", "0"] > 0
    assert samples["autopainter_checkpoint_stall_seconds_total", "small"] > 0
    last, end = (samples["autopainter_last_step_timestamp_seconds", "small", "0"],
                 samples["autopainter_last_end_timestamp_seconds", "small"])  # fmt: skip
    assert before < last <= end < time.time()
    check(exposition(folder))
    more = settings(small_settings, tmp_path / "runs", "train.steps=5", f"telemetry.metrics_folder={folder}")
    loop.train(more, CPU)
    after = collect(folder)
    assert after["autopainter_images_total", "small"] == 40
    assert after["autopainter_attempt", "small"] == 2
    counters = {f"{entry.name}" for entry in METRICS if entry.kind == "counter"}
    assert all(after[key] >= value for key, value in samples.items() if key[0] in counters)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this process, empty."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))  # torch would make it there
    return folder


def test_a_run_with_a_port_only_leaves_nothing(
    small_settings: list[str], tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    seen: list[str] = []
    ended = Metrics.ended

    def look_and_end(metrics: Metrics) -> None:
        seen.append(get(port))
        ended(metrics)

    monkeypatch.setattr(Metrics, "ended", look_and_end)
    loop.train(settings(small_settings, tmp_path / "runs", "train.steps=2", f"telemetry.prometheus_port={port}"), CPU)
    assert parse(seen[0])["autopainter_step", "small"] == 2
    assert list(scratch.iterdir()) == []


def test_a_step_that_is_not_finite_is_counted(
    small_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "total_variation", lambda painted: painted.mean() * float("nan"))
    folder = tmp_path / "metrics"
    with pytest.raises(Diverged):
        loop.train(settings(small_settings, tmp_path / "runs", f"telemetry.metrics_folder={folder}"), CPU)
    samples = collect(folder)
    assert samples["autopainter_not_finite_steps_total", "small"] == 1
    assert samples["autopainter_last_end_timestamp_seconds", "small"] == 0


def test_what_stopped_the_run_before_is_shown_by_its_next_start(small_settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    config = settings(small_settings, tmp_path / "runs", "train.steps=1", f"telemetry.metrics_folder={folder}")
    run = storage.open_store(config.run.uri)
    for kind in ("host memory", "killed", "killed"):
        journal.write(run, kind, "it was", 0)  # type: ignore[arg-type]
    loop.train(config, CPU)
    samples = collect(folder)
    assert samples["autopainter_stops_total", "small", "host memory"] == 1
    assert samples["autopainter_stops_total", "small", "killed"] == 2
    assert samples["autopainter_stops_total", "small", "gpu memory"] == 0


def test_between_two_looks_a_step_looks_at_nothing(watched: Config, metrics: Metrics) -> None:
    metrics._next_look = time.monotonic() + PATIENCE_SECONDS
    for done in range(10):
        metrics.step_done(done, SimpleNamespace())  # type: ignore[arg-type]  # asking it anything would fail
    metrics._next_look = 0.0
    with pytest.raises(AttributeError):
        metrics.step_done(10, SimpleNamespace())  # type: ignore[arg-type]


class LeavingHost(Host):
    """Takes the machine away at once."""

    meeting_seconds = 0.0

    def leaving(self) -> bool:
        return True


def test_a_run_that_has_to_move_has_not_ended(small_settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    config = settings(small_settings, tmp_path / "runs", f"telemetry.metrics_folder={folder}")
    assert loop.train(config, CPU, LeavingHost()).why == "leaving"
    samples = collect(folder)
    assert 0 < samples["autopainter_step", "small"] < config.train.steps
    assert samples["autopainter_last_end_timestamp_seconds", "small"] == 0


def test_counters_go_on_in_a_temporary_folder_after_a_failure(
    small_settings: list[str], tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    config = settings(small_settings, tmp_path / "runs", "train.steps=3", f"telemetry.prometheus_port={port}")
    with monkeypatch.context() as patch:
        patch.setattr(losses, "total_variation", lambda painted: painted.mean() * float("nan"))
        with pytest.raises(Diverged):
            loop.train(config, CPU)
    (left,) = scratch.glob("autopainter-metrics-*")
    assert collect(left)["autopainter_not_finite_steps_total", "small"] == 1
    seen: list[Samples] = []
    logged = Metrics.logged

    def look(metrics: Metrics, *values: Any) -> None:
        logged(metrics, *values)
        seen.append(parse(get(port)))

    monkeypatch.setattr(Metrics, "logged", look)
    loop.train(config, CPU)
    assert {samples["autopainter_not_finite_steps_total", "small"] for samples in seen} == {1}
    assert list(scratch.glob("autopainter-metrics-*")) == []
