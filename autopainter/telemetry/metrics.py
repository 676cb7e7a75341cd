"""Prometheus metrics of a training process."""

import logging
import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from autopainter import storage
from autopainter.data.stream import TrainingStream

log = logging.getLogger(__name__)


class Metrics:
    """The metrics, in a registry of their own, and the endpoint that serves them.

    Args:
        run: name of the run, a label of every metric.
        port: port of the endpoint; 0: none. A port that is taken is a warning, not the end of the run.
        host: address that it listens on.
    """

    def __init__(self, run: str, port: int, host: str = "0.0.0.0") -> None:
        self.registry = CollectorRegistry()
        labels = {"labelnames": ("run",), "registry": self.registry}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"autopainter_{name}", text, **labels).labels(run)  # type: ignore[arg-type]

        def counter(name: str, text: str) -> Counter:
            return Counter(f"autopainter_{name}", text, **labels).labels(run)  # type: ignore[arg-type]

        self._scalar = Gauge(
            "autopainter_loss", "Loss terms and discriminator accuracies of the last logged step",
            ("run", "term"), registry=self.registry,
        )  # fmt: skip
        self._run = run
        self._counted: dict[Counter, float] = {}
        self.step = gauge("step", "Training steps done")
        self.images = counter("images_total", "Images trained on by all workers since this process started")
        self.images_per_second = gauge("images_per_second", "Training throughput of all workers")
        self.data_wait = counter("data_wait_seconds_total", "Time that the training step waited for data")
        self.bytes_read = counter("data_read_bytes_total", "Bytes of shards that this process fetched")
        self.cache_hits = counter("data_cache_hits_total", "Chunks found in the node's cache")
        self.cache_misses = counter("data_cache_misses_total", "Chunks that were fetched though there is a cache")
        self.retries = counter("storage_retries_total", "Attempts of storage operations that failed and were repeated")
        self.ready_batches = gauge("data_ready_batches", "Batches that are made and wait for the training step")
        self.held_bytes = gauge("data_held_bytes", "Bytes of the chunks that the stream holds")
        self.last_step = gauge("last_step_timestamp_seconds", "Unix time of the last training step")
        self.checkpoint_step = gauge("checkpoint_step", "Step of the newest committed checkpoint")
        self.checkpoint_time = gauge("last_checkpoint_timestamp_seconds", "Unix time of the newest checkpoint")
        self.checkpoint_seconds = gauge("checkpoint_seconds", "Time that writing the newest checkpoint took")
        self.checkpoint_failures = counter("checkpoint_failures_total", "Checkpoints that could not be written")
        self.attempt = gauge("attempt", "Number of this start of the run")
        self.memory_rung = gauge("memory_rung", "Steps down the ladder of settings that need less GPU memory")
        self._stops = Gauge(
            "autopainter_stops", "What has stopped the run since it began, or made it step down, by kind",
            ("run", "kind"), registry=self.registry,
        )  # fmt: skip
        if port:
            try:
                self._server, self._thread = start_http_server(port, host, registry=self.registry)
                log.info("metrics at http://%s:%d/metrics", host, port)
            except OSError as error:
                log.warning("telemetry.prometheus_port: %d cannot be opened, no metrics: %s", port, error.strerror)
                port = 0
        self._open = bool(port)

    def started(self, attempt: int, stops: Mapping[str, int], rung: int) -> None:
        """Take over what the run knows of its past: number of this start, journal's entries by kind, memory rung."""
        self.attempt.set(attempt)
        self.memory_rung.set(rung)
        for kind, count in stops.items():
            self._stops.labels(self._run, kind).set(count)

    def stepped_down(self, rungs: int) -> None:
        """Take over that the GPU's memory was too small."""
        self.memory_rung.inc(rungs)
        self._stops.labels(self._run, "gpu memory").inc(rungs)

    def logged(self, step: int, scalars: Mapping[str, float], images_per_second: float) -> None:
        """Take over what a logged step measured."""
        self.step.set(step)
        self.images_per_second.set(images_per_second)
        self.last_step.set(time.time())
        for term, value in scalars.items():
            self._scalar.labels(self._run, term).set(value)

    def streamed(self, stream: TrainingStream) -> None:
        """Take over what the stream has counted since this process started."""
        cache = stream.split.cache
        for counter, total in (
            (self.data_wait, stream.wait_seconds),
            (self.bytes_read, stream.split.bytes_read),
            (self.cache_hits, cache.hits if cache else 0),
            (self.cache_misses, cache.misses if cache else 0),
            (self.retries, storage.retries()),
        ):
            counter.inc(total - self._counted.get(counter, 0))
            self._counted[counter] = total
        self.ready_batches.set(stream.ready_batches)
        self.held_bytes.set(stream.held_bytes)

    def checkpointed(self, step: int, seconds: float, error: Exception | None) -> None:
        """Take over how saving a checkpoint went."""
        if error:
            self.checkpoint_failures.inc()
            return
        self.checkpoint_step.set(step)
        self.checkpoint_seconds.set(seconds)
        self.checkpoint_time.set(time.time())

    def close(self) -> None:
        """Close the endpoint."""
        if self._open:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
