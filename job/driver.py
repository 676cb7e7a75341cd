"""The driver: starts groups of workers until the run is finished, or until it is asked to stop.

Ray Train finds out that a worker died and ends its group. Everything after that is decided here, in one place: whether
the cause can be mended by another start, how long to wait, and when to give up because no checkpoint is gained. (Ray's
own restarts would leave out the failures that its controller takes for final, and have no idea of progress.)
"""

import logging
import threading
from collections.abc import Callable

import ray.exceptions
import ray.train

from autopainter import checkpoint, journal, logs, memory, storage
from autopainter.config import Config
from autopainter.errors import StorageError
from autopainter.host import stop_signals
from autopainter.progress import training_progress
from autopainter.storage import Store
from job import cluster, failures, group
from job.logs import forward_as, log_as

log = logging.getLogger(__name__)

_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
_DOUBLINGS = 10  # of the wait; many more would be no number any more
_CAUSES_SHOWN = 3


def run(config: Config, log_format: logs.Format = "text") -> int:
    """Train on the Ray cluster of RAY_ADDRESS, on one that runs on this machine, or on one that is started for it.

    SIGTERM and Ctrl-C make the workers save after their next step and end.

    Args:
        log_format: as ``autopainter.logs.setup`` takes it; also that of the workers' lines.

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
    forward_as(log_format)
    cluster.connect(config.cluster.workers * config.cluster.cpus_per_worker)
    log_as(log_format)
    gpus = cluster.on_gpus(config.cluster.gpus, config.cluster.workers)
    log.info("workers train on %s", "GPUs" if gpus else "CPUs")
    stop = threading.Event()
    # After connecting, because Ray sets a handler of signals of its own.
    with stop_signals(stop.set) as signals, training_progress() as show:
        if (
            code := _supervise(config, store, stop, lambda: group.run(config, gpus, stop, show, log_format))
        ) is not None:
            return code
    log.info("stopped at the checkpoint of step %s; the same command continues", _saved_step(store))
    return signals.exit_code


def _supervise(config: Config, store: Store, stop: threading.Event, run_group: Callable[[], str]) -> int | None:
    """Run groups until the run has an exit code; None if it was asked to stop."""
    causes: list[str] = []  # of the failures since the last new checkpoint
    known = _saved_step(store)
    while not stop.is_set():
        try:
            why = run_group()
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
            log.warning("%s: restarting on the remaining or replacement nodes", cause)
        saved = _saved_step(store)
        # Compared with the last step that storage told: a storage that is away now and then is no progress.
        causes = [*causes, cause] if saved in (None, known) else []
        known = known if saved is None else saved
        if len(causes) > config.cluster.max_failures:
            log.error(
                "giving up: %d failures in a row without a new checkpoint; the last ones: %s",
                len(causes), " | ".join(causes[-_CAUSES_SHOWN:]),
            )  # fmt: skip
            return 1
        wait = min(_FIRST_WAIT_SECONDS * 2 ** min(len(causes), _DOUBLINGS), _LONGEST_WAIT_SECONDS)
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
