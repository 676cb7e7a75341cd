"""Bounds on time: nothing that does not answer keeps the doctor waiting."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from autopainter.storage import Store, open_store

_RETRIES = 1 / 3
"""Share of a check's time after which storage tries nothing again, so that its own last error is the answer."""

T = TypeVar("T")


def within(seconds: float, task: Callable[[], T]) -> T:
    """Do something, or stop waiting for it: a thread that hangs (in a name server, a dead mount) is left behind.

    Raises:
        TimeoutError: it takes longer.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(task())
        except BaseException as error:  # it belongs to whoever waits
            outcome.set_exception(error)

    threading.Thread(target=run, name="doctor", daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if outcome.done():
            raise
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def with_store(uri: str, seconds: float, task: Callable[[Store], T]) -> T:
    """Do something with a store of its own, without the patience of training.

    Raises:
        TimeoutError: it takes longer.
        OSError, UserError: as ``Store``.
    """
    store = open_store(uri)
    impatient = threading.Timer(seconds * _RETRIES, store.close)
    impatient.daemon = True
    impatient.start()
    try:
        return within(seconds, lambda: task(store))
    finally:
        impatient.cancel()
        store.close()
