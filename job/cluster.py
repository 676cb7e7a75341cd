"""The Ray cluster: connecting to it, and running many small tasks on it."""

import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.exceptions
from ray._common.utils import reset_ray_address
from ray._private import services

from autopainter.errors import StorageError, UserError, one_line

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
_TASK_RETRIES = 5
_TASKS_AHEAD = 2
"""Tasks that are handed to the cluster for each of its cores: enough to keep it busy, and a bound on its memory."""


def connect(needed_cpus: float) -> None:
    """Connect to the cluster of RAY_ADDRESS, to one that runs on this machine, or start one here.

    Raises:
        UserError: it cannot be reached.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    # The last `ray start` on this machine has left its address in a file, which outlives a cluster that is killed.
    found = services.find_bootstrap_address(None) if address in ("", "auto") else address
    hint = ""
    try:
        try:
            hint = _try(found or "")
        except OSError:
            if address:
                raise
            log.info("the Ray cluster that ran on this machine, at %s, is gone: starting one", found)
            reset_ray_address()  # as `ray stop` does: Ray's own actors would look for the cluster there too
        ray.init(logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"RAY_ADDRESS: no Ray cluster answers at {address or 'this machine'}: {reason}{hint}") from None
    there = ray.cluster_resources().get("CPU", 0)
    if needed_cpus > there:
        log.warning("%g CPU cores are needed and the cluster has %g: waiting until it has more", needed_cpus, there)


def on_gpus(wanted: bool | None, workers: int) -> bool:
    """Whether each worker gets a GPU: as ``cluster.gpus`` says, else if the cluster has any now.

    To be asked once: a run on GPUs waits for those of a lost node, instead of going on many times as slowly on CPUs.
    """
    there = ray.cluster_resources().get("GPU", 0)
    gpus = there > 0 if wanted is None else wanted
    if gpus and workers > there:
        log.warning("%d GPUs are needed and the cluster has %g: waiting until it has more", workers, there)
    return gpus


def _try(address: str) -> str:
    """Connect to HOST:PORT, because Ray itself tries for minutes before it says that nobody is there.

    Returns:
        What may be wrong if Ray does not get an answer there.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return ""
    socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    return f"; something listens there: is it Ray {ray.__version__}, and RAY_AUTH_TOKEN its token?"


def run_tasks(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    ticks: Sequence[int],
    progress: Callable[[int], None],
) -> list[Any]:
    """Call ``function(*task, tick)`` for every task on the cluster; a ``data.pool.Run``.

    A task whose process or node dies, or whose storage fails, is run again, up to five times. Progress is counted by
    whole tasks.

    Raises:
        UserError, StorageError: of a task; also a StorageError if a task was killed each time.
    """
    connect(1)
    if len(ray.nodes()) > 1:
        log.info("folders that are named must be shared by all %d nodes", len(ray.nodes()))
    remote = ray.remote(_call).options(num_cpus=1, max_retries=_TASK_RETRIES, retry_exceptions=[StorageError])
    waiting = list(reversed(range(len(tasks))))
    running: dict[Any, int] = {}
    results: list[Any] = [None] * len(tasks)
    done = 0
    while waiting or running:
        while waiting and len(running) < _TASKS_AHEAD * max(ray.cluster_resources().get("CPU", 1), 1):
            number = waiting.pop()
            running[remote.remote(function, tasks[number])] = number
        (finished,), _ = ray.wait(list(running))
        number = running.pop(finished)
        try:
            results[number] = ray.get(finished)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, UserError | StorageError) else error from None
        except ray.exceptions.RayError as error:
            raise StorageError(f"a task was killed {_TASK_RETRIES + 1} times: {one_line(error)}") from None
        done += ticks[number]
        progress(done)
    return results


def _call(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    return function(*task, lambda: None)
