"""The driver: starts groups of workers until the run is finished.

Ray Train finds out that a worker died and ends its group. Everything after that is decided here, in one place: whether
the cause can be mended by another start, how long to wait, and when to give up because no checkpoint is gained. (Ray's
own restarts would leave out the failures that its controller takes for final, and have no idea of progress.)
"""

import logging
import os
import tempfile
import time
from typing import Any

from autopainter import checkpoint, storage
from autopainter.config import Config
from autopainter.errors import Diverged, UserError

# Read by Ray Train when it is imported: see failures within half a second, keep the working directory.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from job import cluster
from job.backend import SafeTorchConfig
from job.worker import train_worker

log = logging.getLogger(__name__)

_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0


def run(config: Config) -> int:
    """Train on the Ray cluster of RAY_ADDRESS, on one that runs on this machine, or on one that is started for it.

    Returns:
        Exit code: 0 when the run is finished, 1 when it failed more than ``cluster.max_failures`` times in a row
        without a new checkpoint.

    Raises:
        UserError: the cluster cannot be reached, or the workers found something that only the user can mend.
        Diverged: a loss is no longer a number.
    """
    if _is_finished(config):
        log.info("run %s is finished: %d steps done", config.run.uri, _saved_step(config))
        return 0
    cluster.connect(config.cluster.workers * config.cluster.cpus_per_worker)
    failures = 0
    while True:
        before = _saved_step(config)
        try:
            _fit(config)
            return 0
        except (ray.train.TrainingFailedError, ray.exceptions.RayError, OSError) as error:
            _raise_final(error)
            failures = failures + 1 if _saved_step(config) == before else 0
            log.warning("the worker group failed: %s", _cause(error))
            if failures > config.cluster.max_failures:
                log.error("giving up: %d failures in a row without a new checkpoint", failures)
                return 1
            wait = min(_FIRST_WAIT_SECONDS * 2**failures, _LONGEST_WAIT_SECONDS)
            log.warning("starting again in %.0f s from the newest checkpoint (step %d)", wait, _saved_step(config))
            time.sleep(wait)


def _saved_step(config: Config) -> int:
    """Step of the newest committed checkpoint, 0 if there is none."""
    return max(checkpoint.steps(storage.open_store(config.run.uri)), default=0)


def _is_finished(config: Config) -> bool:
    """Whether the last checkpoint is there and undamaged."""
    if _saved_step(config) < config.train.steps:
        return False
    newest = checkpoint.newest(storage.open_store(config.run.uri))
    return newest is not None and newest[0].step >= config.train.steps


def _fit(config: Config) -> None:
    wanted = config.cluster
    gpus = wanted.gpus if wanted.gpus is not None else ray.cluster_resources().get("GPU", 0) >= wanted.workers
    # Ray Train wants a place for its own notes. Checkpoints are the library's, so nothing in there is ever needed
    # again, and a folder that is new for each start cannot hold a stale or damaged note.
    with tempfile.TemporaryDirectory(prefix="autopainter-ray-") as notes:
        TorchTrainer(
            train_worker,
            train_loop_config=config.model_dump(mode="json"),
            torch_config=SafeTorchConfig(timeout_s=int(wanted.collective_timeout_seconds)),
            scaling_config=ScalingConfig(
                num_workers=wanted.workers, use_gpu=gpus, resources_per_worker={"CPU": wanted.cpus_per_worker}
            ),
            run_config=RunConfig(
                name=config.run.name, storage_path=notes, failure_config=FailureConfig(max_failures=0)
            ),
        ).fit()


def _failures(error: BaseException) -> dict[int, Any]:
    return dict(getattr(error, "worker_failures", {}))


def _raise_final(error: BaseException) -> None:
    """Raise what is behind a failure of the group if another start would only meet it again."""
    for failure in _failures(error).values():
        if isinstance(failure, UserError | Diverged):
            raise type(failure)(str(failure)) from None


def _cause(error: BaseException) -> str:
    """One line for people: which workers failed, and how."""
    causes = {rank: getattr(failure, "health_check_failure", failure) for rank, failure in _failures(error).items()}
    if not causes:
        return " ".join(str(error).split()) or type(error).__name__
    return "; ".join(
        f"worker {rank}: {type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        for rank, cause in sorted(causes.items())
    )
