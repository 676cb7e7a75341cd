"""One group of workers from its start to its end."""

import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions
from ray.train import FailureConfig, RunConfig, ScalingConfig

from autopainter import logs
from autopainter.config import Config
from autopainter.progress import TrainingProgress
from autopainter.scratch import ScratchFolder
from job.backend import LeanTrainer, SafeTorchConfig
from job.host import driver_link
from job.worker import train_worker

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2  # between two looks at whether a stop was asked for
_LAST_LOOK_SECONDS = 5.0
_WORKER_ENVIRONMENT = {
    # glibc's default lets each of a worker's many threads keep free memory of its own, and ``memory.trim`` cannot give
    # all of that back: worker 0 grew for hours.
    "MALLOC_ARENA_MAX": "1",
}


def run(
    config: Config,
    gpus: bool,
    stop: threading.Event,
    show: Callable[[TrainingProgress], None],
    log_format: logs.Format,
) -> str:
    """Start a group and wait for its end, which ``stop`` asks for; why it ended, as ``loop.Ended.why``.

    Args:
        gpus: whether each worker has a GPU; if so, it waits until there are enough.

    Raises:
        TrainingFailedError, RayError: it failed.
    """
    link = driver_link()
    progress = _Progress(link, show)
    # Ray Train wants a place for its own notes. Checkpoints are the library's, so nothing in there is ever needed
    # again, and a folder that is new for each start cannot hold a stale or damaged note.
    notes = ScratchFolder("ray")
    try:
        parameters = {"config": config.model_dump(mode="json"), "link": link, "log_format": log_format}
        trainer = _trainer(config, gpus, parameters, str(notes.path))
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
            progress.look(_LOOK_SECONDS)
        if not ended.done():
            log.info("stopping: the workers save after their next step")
            if not _end(link, ended, config.cluster.stop_seconds):
                return "stopped"
        return str(ended.result())
    finally:
        progress.finish()
        notes.remove()


class _Progress:
    """Shows what the workers tell.

    An answer that comes late is waited for again at the next look: what is in it is told only once.
    """

    def __init__(self, link: Any, show: Callable[[TrainingProgress], None]) -> None:
        self._link, self._show = link, show
        self._asked: Any = None

    def look(self, seconds: float) -> None:
        """Show what has been told, if the answer comes within so many seconds."""
        try:
            if self._asked is None:
                self._asked = self._link.told.remote()
            told = ray.get(self._asked, timeout=seconds)
        except ray.exceptions.GetTimeoutError:
            return
        except ray.exceptions.RayError:  # it is being started again
            told = []
        self._asked = None
        for progress in told:
            self._show(progress)

    def finish(self) -> None:
        """Show the rest."""
        if self._asked is not None:
            self.look(_LAST_LOOK_SECONDS)
        self.look(_LAST_LOOK_SECONDS)


def _end(link: Any, ended: "concurrent.futures.Future[Any]", seconds: float) -> bool:
    """Ask the workers to stop and wait for them; False if there are none, or if it takes them too long."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ray.exceptions.RayError):
        if not ray.get(link.stop.remote(), timeout=seconds):
            return False  # they have not begun to train
    concurrent.futures.wait([ended], timeout=max(deadline - time.monotonic(), 0))
    if not ended.done():
        log.error("the workers have not stopped after %.0f s (cluster.stop_seconds), they are ended", seconds)
    return ended.done()


def _trainer(config: Config, gpus: bool, parameters: dict[str, Any], notes: str) -> LeanTrainer:
    wanted = config.cluster
    return LeanTrainer(
        train_worker,  # type: ignore[arg-type]  # it may return a value
        train_loop_config=parameters,
        torch_config=SafeTorchConfig(timeout_s=int(wanted.collective_timeout_seconds)),
        scaling_config=ScalingConfig(
            num_workers=wanted.workers, use_gpu=gpus, resources_per_worker={"CPU": wanted.cpus_per_worker}
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # a type checker sees that of Train's first version
            name=config.run.name,
            storage_path=notes,
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": _WORKER_ENVIRONMENT},
        ),
    )
