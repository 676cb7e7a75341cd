"""Tasks spread over local processes, with a counter of what is done, that end when they are told or left alone."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from autopainter.errors import UserError

POLL_SECONDS = 0.1
"""Time between two calls of the progress function."""

GRACE_SECONDS = 3.0
"""A process that is told to end and has not ended a step of its work by then is ended in the middle of it."""

T = TypeVar("T")


Run = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], Sequence[int], Callable[[int], None]], list[Any]]
"""Calls ``function(*task, tick)`` for every task and returns the results in order. It also gets the number of ticks of
each task, and a function that is to be called with the number of ticks so far."""


def local(workers: int) -> Run:
    """Run tasks on so many processes of this machine."""
    return lambda function, tasks, ticks, progress: run(function, tasks, workers, progress)


def run(
    function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], workers: int, progress: Callable[[int], None]
) -> list[T]:
    """Call ``function(*task, tick)`` for every task and return the results in order.

    With one worker everything happens in this process, otherwise in new ones (started by spawn, so a script that comes
    here needs its ``if __name__ == "__main__":``). When a task raises, or this process gets an exception such as
    KeyboardInterrupt, or is killed, the other tasks end at their next tick.

    Args:
        function: top-level function; calls ``tick()`` after each step of its work.
        tasks: its picklable arguments.
        workers: number of processes.
        progress: called with the number of ticks so far.

    Raises:
        UserError: a process was killed from outside.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        done = 0

        def tick_here() -> None:
            nonlocal done
            done += 1
            progress(done)

        return [function(*task, tick_here) for task in tasks]

    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    reader, lifeline = context.Pipe(duplex=False)  # nothing is sent: its end is the signal
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(reader, counter))
    try:
        # Ctrl-C reaches the whole process group. The new processes inherit this mask: only the parent acts on it.
        unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [pool.submit(_call, function, task) for task in tasks]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, POLL_SECONDS, FIRST_EXCEPTION)
            for future in finished:
                future.result()
            progress(counter.get_obj().value)  # without its lock, which a killed process may hold
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; run the same command again with fewer workers"
        ) from None
    finally:
        lifeline.close()
        pool.shutdown(cancel_futures=True)
        reader.close()


_counter: Any = None
_ending = threading.Event()


def _start(lifeline: Connection, counter: Any) -> None:
    global _counter
    _counter = counter
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    _ending.set()
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _call(function: Callable[..., T], task: tuple[Any, ...]) -> T:
    return function(*task, _tick)


def _tick() -> None:
    if _ending.is_set():
        raise SystemExit
    with _counter.get_lock():
        _counter.value += 1
