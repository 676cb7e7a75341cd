"""One small interface over local folders and S3: the only module that knows where bytes live.

A *store* is opened on a folder or an ``s3://bucket/prefix`` and speaks in keys relative to it. Writes are atomic: a
reader sees the old object or the whole new one. Every S3 operation is retried with back-off inside a total time
budget; credentials and endpoint come from the environment or the platform's identity (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, web identity), never from a URI.
"""

from autopainter.errors import StorageError, UserError
from autopainter.storage import https
from autopainter.storage.local import LocalStore, lasting
from autopainter.storage.mapped import mapped
from autopainter.storage.retry import failures, retries
from autopainter.storage.s3 import S3Store
from autopainter.storage.store import Store, StoredObject
from autopainter.uri import check, split

__all__ = [
    "LocalStore",
    "S3Store",
    "Store",
    "StoredObject",
    "failures",
    "lasting",
    "mapped",
    "open_store",
    "read_input",
    "read_uri",
    "retries",
]


def open_store(uri: str) -> Store:
    """Open a folder path or an ``s3://bucket/prefix`` URI; nothing is contacted yet.

    Raises:
        UserError: the URI has another scheme or names no bucket.
    """
    _check(uri)
    if uri.startswith("s3://"):
        return S3Store(uri)
    if not uri or "://" in uri or uri == "s3:/":  # what split leaves of s3://NAME
        raise UserError(f"{uri!r}: unknown kind of storage; use a folder or s3://BUCKET/PREFIX")
    return LocalStore(uri)


def read_uri(uri: str) -> bytes:
    """Read one whole object from a path, ``s3://`` or ``https://``.

    Raises:
        FileNotFoundError: it is not there.
        UserError: no such URI can be, or it may not be read.
        StorageError: storage kept failing.
    """
    _check(uri)
    if uri.startswith("https://"):
        return https.read(uri)
    folder, name = split(uri)
    return open_store(folder).read(name)


def read_input(uri: str, field: str, advice: str) -> bytes:
    """``read_uri`` of what a field of the configuration names.

    Args:
        field: the field, for the message.
        advice: what to do if there is nothing there.

    Raises:
        UserError: it is not there or cannot be read.
        StorageError: storage kept failing.
    """
    try:
        return read_uri(uri)
    except StorageError:
        raise
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{field}: {uri}: not found; {advice}") from None
    except IsADirectoryError:
        raise UserError(f"{field}: {uri}: is a folder, not a file; {advice}") from None
    except OSError as error:
        raise UserError(f"{field}: {uri}: cannot be read: {error.strerror}") from None


def _check(uri: str) -> None:
    try:
        check(uri)
    except ValueError as error:
        raise UserError(str(error)) from None
