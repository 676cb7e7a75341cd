"""A whole object as memory that the system can put out again, for objects that may be larger than the memory."""

import mmap
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

from autopainter.storage.local import LocalStore
from autopainter.storage.store import Store

_READ_BYTES = 16 << 20
"""Part of an object that is read at once."""


@contextmanager
def mapped(store: Store, key: str) -> Iterator[mmap.mmap | bytes]:
    """The bytes of an object: a file of a folder as it is, anything else in an unnamed temporary file.

    Raises:
        FileNotFoundError: there is no such object.
    """
    size = store.size(key)
    if size is None:
        raise FileNotFoundError(f"{store.locate(key)}: not found")
    if size == 0:
        yield b""
        return
    with ExitStack() as stack:
        file: IO[bytes]
        if isinstance(store, LocalStore):
            file = stack.enter_context((store.root / key).open("rb"))
        else:
            file = stack.enter_context(tempfile.TemporaryFile())
            for start in range(0, size, _READ_BYTES):
                file.write(store.read_range(key, start, min(start + _READ_BYTES, size)))
            file.flush()
        yield stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
