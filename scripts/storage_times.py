"""How long this process's storage waits and tries, changed for a while: for whoever gives it faults."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from autopainter.storage import download, retry, s3


@contextlib.contextmanager
def storage_times(retry_seconds: float | None = None, timeout_seconds: float | None = None) -> Iterator[None]:
    """Take these for ``RETRY_SECONDS`` and ``TIMEOUT_SECONDS``, where they are given, in S3 stores made meanwhile."""
    given = [(retry, "RETRY_SECONDS", retry_seconds)]
    given += [(module, "TIMEOUT_SECONDS", timeout_seconds) for module in (s3, download)]
    with contextlib.ExitStack() as stack:
        stack.callback(s3.shared_client.cache_clear)
        for module, name, seconds in given:
            if seconds is not None:
                stack.enter_context(mock.patch.object(module, name, seconds))
        s3.shared_client.cache_clear()
        yield
