"""What a worker records of itself and, if it is worker 0, of the run; and where it can be scraped.

Each worker keeps its values in a file of its own, in ``telemetry.metrics_folder`` or a temporary folder of the run, so
that counters go on when a worker is started again. The first worker of each machine serves the files of all.
"""

import logging
import os
import time
import typing
from collections.abc import Mapping
from pathlib import Path

import torch

from autopainter import journal, parallel, storage
from autopainter.cgroup import Groups
from autopainter.config import Config
from autopainter.data.stream import TrainingStream
from autopainter.telemetry import memory_use
from autopainter.telemetry import metric_list as metric
from autopainter.telemetry.metric_files import Recorder, temporary_folder
from autopainter.telemetry.metric_server import MetricsServer

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Between two looks at what a worker counts."""


class Metrics:
    """The metrics of one worker of one start of a run. What is about the run as a whole, only worker 0 keeps.

    Args:
        device: the worker's.
        begun: Unix time of this start, the same in all workers.
        done: steps that were done before it.
    """

    def __init__(self, config: Config, device: torch.device, begun: float, done: int) -> None:
        self._config, self._device = config, device
        self._folder = _folder(config)
        self._server: MetricsServer | None = None
        self._port_taken = self._ended = False
        self._next_look = 0.0
        self._recorder = Recorder(config.run.name, parallel.rank(), begun, self._folder)
        self._counted: dict[metric.Metric, float] = {
            metric.RETRIES: storage.retries(),
            metric.STORAGE_ERRORS: storage.failures(),
        }
        record = self._recorder
        for moment in (metric.LAST_STEP, metric.LAST_CHECKPOINT):
            record.set(moment, time.time())
        for counter in (metric.NOT_FINITE, metric.CHECKPOINT_FAILURES, metric.CHECKPOINT_STALL):
            record.add(counter, 0)
        record.set(metric.LAST_END, 0)
        record.set(metric.TARGET_STEPS, config.train.steps)
        record.set(metric.WORKERS, parallel.world())
        record.set(metric.CHECKPOINT_MAX_AGE, config.checkpoint.max_age_seconds)
        self._progress(done)
        self._write()

    def started(self, attempt: int, stops: Mapping[str, int], rung: int) -> None:
        """Take over what the run knows of its past: number of this start, journal's entries by kind, memory rung."""
        self._recorder.set(metric.ATTEMPT, attempt)
        self._recorder.set(metric.MEMORY_RUNG, rung)
        for kind in typing.get_args(journal.Kind):
            self._recorder.reach(metric.STOPS, stops.get(kind, 0), kind)
        self._write()

    def stepped_down(self, rungs: int) -> None:
        """Take over that the GPU's memory was too small."""
        self._recorder.add(metric.MEMORY_RUNG, rungs)
        self._recorder.add(metric.STOPS, rungs, "gpu memory")
        self._write()

    def step_done(self, done: int, stream: TrainingStream) -> None:
        """Take over that a step is done and, every few seconds, what else there is to see; for each step."""
        self._recorder.set(metric.LAST_STEP, time.time())
        self._progress(done)
        if self._folder and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            self.streamed(stream)
            self._write()

    def streamed(self, stream: TrainingStream) -> None:
        """Look at what the stream and storage have counted in this process, and at memory."""
        cache, record = stream.split.cache, self._recorder
        totals = {
            metric.DATA_WAIT: stream.wait_seconds,
            metric.BYTES_READ: stream.split.bytes_read,
            metric.CACHE_HITS: cache.hits if cache else 0,
            metric.CACHE_MISSES: cache.misses if cache else 0,
            metric.RETRIES: storage.retries(),
            metric.STORAGE_ERRORS: storage.failures(),
        }
        for counter, total in totals.items():
            record.add(counter, total - self._counted.get(counter, 0))
        self._counted = dict(totals)
        record.set(metric.READY_BATCHES, stream.ready_batches)
        record.set(metric.HELD_BYTES, stream.held_bytes)
        record.set(metric.RESIDENT, memory_use.resident())
        for which, amount in zip((metric.HOST_USED, metric.HOST_TOTAL), memory_use.host(Groups()), strict=True):
            record.set(which, amount)
        if gpu := memory_use.gpu(self._device):
            for which, amount in zip((metric.GPU_USED, metric.GPU_TOTAL, metric.GPU_PEAK), gpu, strict=True):
                record.set(which, amount)

    def logged(
        self, values: Mapping[str, float], images_per_second: float, learning_rates: Mapping[str, float]
    ) -> None:
        """Take over what a logged step measured: values by the names of ``trainer.SCALARS``."""
        self._recorder.set(metric.IMAGES_PER_SECOND, images_per_second)
        for name, value in values.items():
            network, _, term = name.partition("/")
            if term.startswith("accuracy_"):
                self._recorder.set(metric.ACCURACY, value, term.removeprefix("accuracy_"))
            elif term == "gradient_norm":
                self._recorder.set(metric.GRADIENT_NORM, value, network)
            else:
                self._recorder.set(metric.LOSS, value, name)
        for network, rate in learning_rates.items():
            self._recorder.set(metric.LEARNING_RATE, rate, network)

    def checkpointed(self, step: int, seconds: float, error: Exception | None) -> None:
        """Take over how writing a checkpoint went; called in the thread that wrote it."""
        if error:
            self._recorder.add(metric.CHECKPOINT_FAILURES, 1)
        else:
            self._recorder.set(metric.CHECKPOINT_STEP, step)
            self._recorder.set(metric.CHECKPOINT_SECONDS, seconds)
            self._recorder.set(metric.LAST_CHECKPOINT, time.time())
        self._recorder.write()

    def stalled(self, seconds: float) -> None:
        """Take over how long training stood still for a checkpoint."""
        self._recorder.add(metric.CHECKPOINT_STALL, seconds)

    def not_finite(self) -> None:
        """Take over that a step's values were not finite."""
        self._recorder.add(metric.NOT_FINITE, 1)

    def ended(self) -> None:
        """Take over that the run ends, or pauses, on purpose."""
        self._recorder.set(metric.LAST_END, time.time())
        self._ended = True

    def close(self) -> None:
        """Write the last values and close the endpoint; of a run that ended, what was temporary is removed."""
        self._recorder.write()
        if self._server:
            self._server.close()
        if self._ended and self._config.telemetry.metrics_folder is None:
            self._recorder.remove()

    def _progress(self, done: int) -> None:
        self._recorder.set(metric.STEP, done)
        self._recorder.reach(metric.IMAGES, done * self._config.train.global_batch)

    def _write(self) -> None:
        """Write the values, and open the endpoint if that was not possible before."""
        self._recorder.write()
        telemetry = self._config.telemetry
        first_here = os.environ.get("LOCAL_RANK", str(parallel.rank())) == "0"
        if not (self._folder and telemetry.prometheus_port and first_here) or self._server:
            return
        try:
            self._server = MetricsServer(self._folder, telemetry.prometheus_port, telemetry.prometheus_host)
            log.info("metrics at http://%s:%d/metrics", telemetry.prometheus_host, telemetry.prometheus_port)
        except OSError as error:
            if not self._port_taken:
                log.warning(
                    "telemetry.prometheus_port: %d cannot be opened, will try again: %s",
                    telemetry.prometheus_port, error.strerror,
                )  # fmt: skip
            self._port_taken = True


def _folder(config: Config) -> Path | None:
    """Where the workers of this machine keep their values; None if nobody can look at them."""
    telemetry = config.telemetry
    if telemetry.metrics_folder is None and not telemetry.prometheus_port:
        return None
    try:
        if telemetry.metrics_folder is not None:
            folder = Path(telemetry.metrics_folder)
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        return temporary_folder(config.run.uri)
    except OSError as error:
        log.warning("no metrics: %s", error)
        return None
