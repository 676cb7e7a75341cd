"""The driver: starts groups of workers until the run is finished, or until it is asked to stop.

Ray Train finds out that a worker died and ends its group. Everything after that is decided here, in one place: whether
the cause can be mended by another start, how long to wait, and when to give up because no checkpoint is gained. (Ray's
own restarts would leave out the failures that its controller takes for final, and have no idea of progress.)
"""

import concurrent.futures
import contextlib
import logging
import os
import threading
import time
from typing import Any

from autopainter import checkpoint, journal, memory, storage
from autopainter.config import Config
from autopainter.errors import StorageError
from autopainter.host import stop_signals
from autopainter.scratch import ScratchFolder
from autopainter.storage import Store

# Read by Ray Train when it is imported: see failures and drained nodes soon, keep the working directory.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from job import cluster, failures
from job.backend import SafeTorchConfig
from job.host import stop_flag
from job.worker import train_worker

log = logging.getLogger(__name__)

_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
_LOOK_SECONDS = 0.2  # between two looks at whether a stop was asked for
_CAUSES_SHOWN = 3
_WORKER_ENVIRONMENT = {
    # glibc's default lets each of a worker's many threads keep free memory of its own: worker 0 grew for hours.
    "MALLOC_ARENA_MAX": "2",
}


def run(config: Config) -> int:
    """Train on the Ray cluster of RAY_ADDRESS, on one that runs on this machine, or on one that is started for it.

    SIGTERM and Ctrl-C make the workers save after their next step and end.

    Returns:
        Exit code: 0 when the run is finished; 1 when it failed more than ``cluster.max_failures`` times in a row
        without a new checkpoint; 143 or 130 after SIGTERM or Ctrl-C.

    Raises:
        UserError: the cluster cannot be reached, or the workers found something that only the user can mend.
        Diverged: a loss is no longer a number.
        Superseded: another start of the run has taken over.
        CheckpointTooOld: no checkpoint could be saved for too long.
    """
    store = storage.open_store(config.run.uri)
    if _is_finished(config, store):
        log.info("run %s is finished: %d steps done", config.run.uri, _saved_step(store))
        return 0
    cluster.connect(config.cluster.workers * config.cluster.cpus_per_worker)
    stop = threading.Event()
    with stop_signals(stop.set) as signals:  # after connecting, because Ray sets a handler of its own
        if (code := _supervise(config, store, stop)) is not None:
            return code
    log.info("stopped at the checkpoint of step %s; the same command continues", _saved_step(store))
    return signals.exit_code


def _supervise(config: Config, store: Store, stop: threading.Event) -> int | None:
    """Start groups until the run has an exit code; None if it was asked to stop."""
    causes: list[str] = []  # of the failures since the last new checkpoint
    while not stop.is_set():
        before = _saved_step(store)
        try:
            why = _fit(config, stop)
        except (ray.train.TrainingFailedError, ray.exceptions.RayError, OSError) as error:
            if final := failures.final(error):
                raise final from None
            failure = failures.explain(error)
            log.warning("the worker group failed: %s", failure.text)
            if failure.ray_memory_monitor:
                memory.note_host(store, config, config.cluster.workers, failure.text)
            elif failure.kind != "host memory":  # the worker itself has written of that
                journal.write(store, failure.kind, failure.text, _saved_step(store))
            cause = failure.text
        else:
            if why in ("finished", "stopped"):
                return 0 if why == "finished" else None
            cause = "a node that runs a worker is taken away"
            log.warning("%s: moving to what is left or comes instead", cause)
        saved = _saved_step(store)
        causes = [*causes, cause] if saved in (None, before) else []
        if len(causes) > config.cluster.max_failures:
            log.error(
                "giving up: %d failures in a row without a new checkpoint; the last ones: %s",
                len(causes), " | ".join(causes[-_CAUSES_SHOWN:]),
            )  # fmt: skip
            return 1
        wait = min(_FIRST_WAIT_SECONDS * 2 ** len(causes), _LONGEST_WAIT_SECONDS)
        log.warning("starting again in %.0f s from the newest checkpoint (step %s)", wait, saved)
        stop.wait(wait)
    return None


def _saved_step(store: Store) -> int | None:
    """Step of the newest committed checkpoint, 0 if there is none, None if storage does not tell."""
    try:
        return max(checkpoint.steps(store), default=0)
    except StorageError as error:
        log.warning("the run's checkpoints cannot be listed: %s", error)
        return None


def _is_finished(config: Config, store: Store) -> bool:
    """Whether the last checkpoint is there and undamaged."""
    if max(checkpoint.steps(store), default=0) < config.train.steps:
        return False
    newest = checkpoint.newest(store)
    return newest is not None and newest[0].step >= config.train.steps


def _fit(config: Config, stop: threading.Event) -> str:
    """Run one group of workers to its end; why it ended."""
    # Ray Train wants a place for its own notes. Checkpoints are the library's, so nothing in there is ever needed
    # again, and a folder that is new for each start cannot hold a stale or damaged note.
    notes = ScratchFolder("ray")
    try:
        flag = stop_flag()
        trainer = _trainer(config, flag, str(notes.path))
        ended: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def fit() -> None:
            try:
                ended.set_result(trainer.fit().return_value)  # type: ignore[attr-defined]
            except BaseException as error:  # for the thread that waits
                ended.set_exception(error)

        # In the main thread fit() would take Ctrl-C for itself and abort the workers without a checkpoint.
        threading.Thread(target=fit, name="fit", daemon=True).start()
        while not ended.done() and not stop.is_set():
            concurrent.futures.wait([ended], timeout=_LOOK_SECONDS)
        if not ended.done():
            log.info("stopping: the workers save after their next step")
            if not _end_workers(flag, ended, config.cluster.stop_seconds):
                return "stopped"
        return str(ended.result())
    finally:
        notes.remove()


def _end_workers(flag: Any, ended: "concurrent.futures.Future[Any]", seconds: float) -> bool:
    """Ask the workers to stop and wait for them; False if there are none, or if it takes them too long."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ray.exceptions.RayError):
        if not ray.get(flag.raise_.remote(), timeout=seconds):
            return False  # they have not begun to train
    concurrent.futures.wait([ended], timeout=max(deadline - time.monotonic(), 0))
    if not ended.done():
        log.error("the workers have not stopped after %.0f s (cluster.stop_seconds), they are ended", seconds)
    return ended.done()


def _trainer(config: Config, flag: Any, notes: str) -> TorchTrainer:
    wanted = config.cluster
    gpus = wanted.gpus if wanted.gpus is not None else ray.cluster_resources().get("GPU", 0) >= wanted.workers
    return TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # it may return a value
        train_loop_config={"config": config.model_dump(mode="json"), "stop": flag},
        torch_config=SafeTorchConfig(timeout_s=int(wanted.collective_timeout_seconds)),
        scaling_config=ScalingConfig(
            num_workers=wanted.workers, use_gpu=gpus, resources_per_worker={"CPU": wanted.cpus_per_worker}
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=notes,
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": _WORKER_ENVIRONMENT},
        ),
    )
