"""Every metric of a run, once: recording, serving, the dashboard and the tables of the docs are made from this list."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as Prometheus stores it.
        kind: a counter never goes down while its file lives, a restart of the worker included.
        help: what it says, one line.
        unit: what it counts, for people and for the axes of the dashboard.
        labels: names of its own labels, after ``run`` and, for one of a worker, ``rank``.
        of: who records it: each worker for itself, or worker 0 for the run.
    """

    name: str
    kind: Kind
    help: str
    unit: str
    labels: tuple[str, ...] = ()
    of: Literal["run", "worker"] = "run"

    @property
    def label_names(self) -> tuple[str, ...]:
        """All its labels."""
        return ("run", *(("rank",) if self.of == "worker" else ()), *self.labels)


METRICS: list[Metric] = []


def _metric(name: str, *rest: str, **more: object) -> Metric:
    METRICS.append(Metric(f"autopainter_{name}", *rest, **more))  # type: ignore[arg-type]
    return METRICS[-1]


def _of_worker(name: str, *rest: str) -> Metric:
    return _metric(name, *rest, of="worker")


# The run

STEP = _metric("step", "gauge", "Training steps done", "steps")
TARGET_STEPS = _metric("target_steps", "gauge", "Training steps that the run ends after", "steps")
WORKERS = _metric("workers", "gauge", "Worker processes of this start", "workers")
IMAGES = _metric("images_total", "counter", "Images trained on: steps done times the global batch", "images")
IMAGES_PER_SECOND = _metric("images_per_second", "gauge", "Throughput of all workers between the last logged steps",
                            "images/s")  # fmt: skip
LOSS = _metric("loss", "gauge", "Losses of the last logged step: each network's whole, and the generator's terms before"
               " their weights", "loss", labels=("term",))  # fmt: skip
ACCURACY = _metric("discriminator_accuracy_ratio", "gauge", "Share of real or painted patches that the discriminator"
                   " takes for what they are", "ratio", labels=("kind",))  # fmt: skip
GRADIENT_NORM = _metric("gradient_norm", "gauge", "Norm of the mean gradient", "norm", labels=("network",))
LEARNING_RATE = _metric("learning_rate", "gauge", "Step size of the optimiser", "rate", labels=("network",))
NOT_FINITE = _metric("not_finite_steps_total", "counter", "Steps with a loss or a gradient that was not finite;"
                     " the run stops at the first", "steps")  # fmt: skip
CHECKPOINT_STEP = _metric("checkpoint_step", "gauge", "Step of the newest committed checkpoint", "steps")
LAST_CHECKPOINT = _metric("last_checkpoint_timestamp_seconds", "gauge", "Unix time of the newest checkpoint of this"
                          " start; of the start before there is one", "time")  # fmt: skip
CHECKPOINT_SECONDS = _metric("checkpoint_seconds", "gauge", "Time that writing the newest checkpoint took, beside"
                             " training", "seconds")  # fmt: skip
CHECKPOINT_STALL = _metric("checkpoint_stall_seconds_total", "counter", "Time that training stood still for"
                           " checkpoints", "seconds")  # fmt: skip
CHECKPOINT_FAILURES = _metric("checkpoint_failures_total", "counter", "Checkpoints that could not be written",
                              "checkpoints")  # fmt: skip
CHECKPOINT_MAX_AGE = _metric("checkpoint_max_age_seconds", "gauge", "The configured checkpoint.max_age_seconds",
                             "seconds")  # fmt: skip
ATTEMPT = _metric("attempt", "gauge", "Number of this start of the run", "starts")
STOPS = _metric("stops_total", "counter", "What has stopped the run since it began, or made it take less memory, by"
                " kind as in its journal", "stops", labels=("kind",))  # fmt: skip
MEMORY_RUNG = _metric("memory_rung", "gauge", "Steps down the ladder of settings that need less GPU memory", "rungs")
LAST_END = _metric("last_end_timestamp_seconds", "gauge", "Unix time of the last end that was no accident, 0 before"
                   " any", "time")  # fmt: skip

# Each worker

LAST_STEP = _of_worker("last_step_timestamp_seconds", "gauge", "Unix time of the last step; of the start before there"
                       " is one", "time")  # fmt: skip
DATA_WAIT = _of_worker("data_wait_seconds_total", "counter", "Time that training waited for data", "seconds")
BYTES_READ = _of_worker("data_read_bytes_total", "counter", "Bytes of shards that were fetched", "bytes")
CACHE_HITS = _of_worker("data_cache_hits_total", "counter", "Chunks found in the node's cache", "chunks")
CACHE_MISSES = _of_worker("data_cache_misses_total", "counter", "Chunks that were fetched though there is a cache",
                          "chunks")  # fmt: skip
READY_BATCHES = _of_worker("data_ready_batches", "gauge", "Batches that are made and wait for training", "batches")
HELD_BYTES = _of_worker("data_held_bytes", "gauge", "Bytes of the chunks that the stream holds", "bytes")
RETRIES = _of_worker("storage_retries_total", "counter", "Attempts of storage operations that failed and were"
                     " repeated", "attempts")  # fmt: skip
STORAGE_ERRORS = _of_worker("storage_errors_total", "counter", "Storage operations that failed for good", "operations")
GPU_USED = _of_worker("gpu_memory_used_bytes", "gauge", "Used memory of the worker's GPU, by all processes; none on a"
                      " CPU", "bytes")  # fmt: skip
GPU_TOTAL = _of_worker("gpu_memory_total_bytes", "gauge", "Memory of the worker's GPU; none on a CPU", "bytes")
GPU_PEAK = _of_worker("gpu_memory_peak_bytes", "gauge", "Most GPU memory that this worker's tensors took since its"
                      " start; none on a CPU", "bytes")  # fmt: skip
RESIDENT = _of_worker("resident_memory_bytes", "gauge", "Host memory of the worker process", "bytes")
HOST_USED = _of_worker("host_memory_used_bytes", "gauge", "Used memory of the worker's container, else of its machine",
                       "bytes")  # fmt: skip
HOST_TOTAL = _of_worker("host_memory_total_bytes", "gauge", "Memory that the worker's container may use, else that of"
                        " its machine", "bytes")  # fmt: skip
