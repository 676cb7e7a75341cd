"""One small interface over local folders and S3: the only module that knows where bytes live.

A *store* is opened on a folder or an ``s3://bucket/prefix`` and speaks in keys relative to it. Writes are atomic: a
reader sees the old object or the whole new one. Every S3 operation is retried with back-off inside a total time
budget; credentials and endpoint come from the environment or the platform's identity (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, web identity), never from a URI.
"""

import contextlib
import functools
import http.client
import io
import logging
import os
import ssl
import tempfile
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions
import tenacity

from autopainter.errors import CorruptData, StorageError, UserError
from autopainter.uri import check, split

log = logging.getLogger(__name__)

RETRY_SECONDS = float(os.environ.get("AUTOPAINTER_STORAGE_RETRY_SECONDS", "60"))
"""Total time that one operation may spend on retries before it fails."""

MULTIPART_BYTES = 16 << 20
"""Objects larger than this are uploaded in parts, in parallel."""

_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it

_DELETE_KEYS = 1000  # what one request of S3 can delete

T = TypeVar("T")


@dataclass(frozen=True)
class StoredObject:
    """A name and its size, as ``Store.list`` finds them."""

    key: str
    bytes: int


class Store(ABC):
    """Objects under one root. Keys are relative, with ``/`` between their parts.

    All methods raise ``FileNotFoundError`` for an object that is not there, ``UserError`` for what the user must mend
    (no such bucket, refused credentials) and ``StorageError`` for what kept failing after all retries.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def locate(self, key: str) -> str:
        """The full URI of a key, for messages."""
        return f"{self.uri}/{key}" if key else self.uri

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object; ``CorruptData`` if the object ends before ``stop``."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Create an object if there is none; True if it now holds exactly ``data`` (so a retried create is true)."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[StoredObject]:
        """All objects whose key begins with ``prefix``, sorted by key."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there are passed over."""

    def size(self, key: str) -> int | None:
        """Size of an object in bytes, None if there is none."""
        return next((found.bytes for found in self.list(key) if found.key == key), None)


class LocalStore(Store):
    """A folder. Files are written beside their place, synced and renamed, so a crash leaves no half file."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.root = Path(uri)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        with (self.root / key).open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise CorruptData(f"{self.locate(key)}: ends at byte {start + len(data)}, expected {stop}")
        return data

    def _write(self, key: str, data: bytes, place: Callable[[Path, Path], None]) -> None:
        target = self.root / key
        handle, name = self._temporary(key, target.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), 0o666 & ~_UMASK)  # mkstemp's 0600 would hide it from other users
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            place(temporary, target)
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)

    def _temporary(self, key: str, folder: Path) -> tuple[int, str]:
        """An open temporary file in a folder, which is made if need be."""
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return tempfile.mkstemp(dir=folder, prefix=".tmp-")
            except (PermissionError, NotADirectoryError, FileExistsError) as error:
                if not isinstance(error, FileExistsError) or (folder.exists() and not folder.is_dir()):
                    raise UserError(f"{self.locate(key)}: cannot be written: {error.strerror}") from None
            except FileNotFoundError:
                pass  # another process has just deleted the last file of this folder, and the folder with it

    def write(self, key: str, data: bytes) -> None:
        self._write(key, data, os.replace)

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._write(key, data, os.link)  # link, unlike rename, refuses an existing target
        except FileExistsError:
            return self.read(key) == data
        return True

    def list(self, prefix: str = "") -> list[StoredObject]:
        folder = self.root / prefix if prefix.endswith("/") or not prefix else (self.root / prefix).parent
        found = []
        for parent, _, names in os.walk(folder):  # passes over folders that vanish meanwhile
            for path in (Path(parent, name) for name in names if not name.startswith(".tmp-")):
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):
                        found.append(StoredObject(key, path.stat().st_size))
        return sorted(found, key=lambda entry: entry.key)

    def size(self, key: str) -> int | None:
        path = self.root / key
        return path.stat().st_size if path.is_file() else None

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self.root / key
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self.root).parents[:-1]:
                try:
                    (self.root / folder).rmdir()
                except OSError:
                    break


_MISSING = {"404", "NoSuchKey", "NotFound"}
_REFUSED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "Forbidden"}


class _Transient(StorageError):
    """An attempt failed in a way that another attempt may mend."""


def _retry(attempt: Callable[[], T]) -> T:
    """Call ``attempt`` until it does not raise ``_Transient``, or its time is used up; the last error is raised."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_Transient),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
        stop=tenacity.stop_after_delay(RETRY_SECONDS),
        before_sleep=lambda state: log.warning(
            "storage: attempt %d failed, trying again: %s",
            state.attempt_number,
            state.outcome.exception() if state.outcome else "",
        ),
        reraise=True,
    )
    return retrying(attempt)


class S3Store(Store):
    """A prefix in a bucket of any S3-compatible service."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        if not bucket:
            raise UserError(f"{uri!r} names no bucket: write s3://BUCKET/PREFIX")
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""

    def _call(self, key: str, operation: Callable[[Any], T]) -> T:
        """Run one operation until it succeeds, fails for good, or has used up its time."""

        def attempt() -> T:
            try:
                return operation(_client())
            except botocore.exceptions.ClientError as error:
                raise self._explain(key, error) from error
            except (
                botocore.exceptions.NoCredentialsError,
                botocore.exceptions.PartialCredentialsError,
                botocore.exceptions.ProfileNotFound,
            ) as error:
                raise UserError(
                    f"{self.locate(key)}: no credentials ({_one_line(error)});"
                    " set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                ) from error
            except botocore.exceptions.ParamValidationError as error:
                raise UserError(f"{self.locate(key)}: not a valid bucket or key") from error
            except (botocore.exceptions.BotoCoreError, OSError) as error:
                raise _Transient(f"{self.locate(key)}: {_one_line(error)}") from error
            except ValueError as error:  # of making the client
                raise UserError(
                    f"{self.locate(key)}: {_one_line(error)}; write AWS_ENDPOINT_URL as http://HOST:PORT"
                ) from None

        return _retry(attempt)

    def _explain(self, key: str, error: botocore.exceptions.ClientError) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return UserError(f"{self.uri}: there is no bucket {self.bucket!r} at {_client().meta.endpoint_url}")
        if code in _REFUSED or status in (401, 403):
            return UserError(
                f"{self.locate(key)}: {_client().meta.endpoint_url} refused the credentials ({code});"
                " check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights of that key"
            )
        if code == "InvalidRange" or status == 416:
            return CorruptData(f"{self.locate(key)}: ends before the range that was asked for")
        if code in _MISSING or status == 404:
            return FileNotFoundError(f"{self.locate(key)}: not found")
        if status >= 500 or code in ("SlowDown", "RequestTimeout", "ConditionalRequestConflict") or status == 429:
            return _Transient(f"{self.locate(key)}: {code} (HTTP {status})")
        return StorageError(f"{self.locate(key)}: {_one_line(error)}")

    def _get(self, key: str, **options: str) -> bytes:
        def get(client: Any) -> bytes:
            body: bytes = client.get_object(Bucket=self.bucket, Key=self.prefix + key, **options)["Body"].read()
            return body

        return self._call(key, get)

    def read(self, key: str) -> bytes:
        return self._get(key)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        try:
            data = self._get(key, Range=f"bytes={start}-{stop - 1}")
        except CorruptData:
            raise CorruptData(f"{self.locate(key)}: ends at or before byte {start}, expected {stop}") from None
        if len(data) != stop - start:
            raise CorruptData(f"{self.locate(key)}: ends at byte {start + len(data)}, expected {stop}")
        return data

    def write(self, key: str, data: bytes) -> None:
        if len(data) > MULTIPART_BYTES:
            self._call(key, lambda client: client.upload_fileobj(io.BytesIO(data), self.bucket, self.prefix + key))
        else:
            self._call(key, lambda client: client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data))

    def create(self, key: str, data: bytes) -> bool:
        def put(client: Any) -> bool:
            try:
                client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data, IfNoneMatch="*")
            except botocore.exceptions.ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 412:
                    raise
                return False
            return True

        return self._call(key, put) or self.read(key) == data

    def list(self, prefix: str = "") -> list[StoredObject]:
        def pages(client: Any) -> list[StoredObject]:
            paginator = client.get_paginator("list_objects_v2")
            return [
                StoredObject(entry["Key"].removeprefix(self.prefix), entry["Size"])
                for page in paginator.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
                for entry in page.get("Contents", ())
                if not entry["Key"].endswith("/")
            ]

        return sorted(self._call(prefix, pages), key=lambda entry: entry.key)

    def delete(self, keys: Iterable[str]) -> None:
        names = [{"Key": self.prefix + key} for key in keys]
        for first in range(0, len(names), _DELETE_KEYS):
            batch = {"Objects": names[first : first + _DELETE_KEYS], "Quiet": True}
            self._call("", functools.partial(self._delete, batch))

    def _delete(self, batch: dict[str, Any], client: Any) -> None:
        answer = client.delete_objects(Bucket=self.bucket, Delete=batch)
        for error in answer.get("Errors", ()):
            raise StorageError(f"{self.locate('')}: {error.get('Key')} cannot be deleted: {error.get('Code')}")


@functools.cache
def _client() -> Any:
    """One client a process: boto3 clients are thread-safe, and building one takes a good part of a second."""
    return boto3.client(
        "s3",
        region_name=os.environ.get("AWS_REGION"),  # which boto3 itself does not read
        config=botocore.config.Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL") else "auto"},
            retries={"total_max_attempts": 1},  # _call retries, the reading of the body included
            connect_timeout=10,
            read_timeout=30,
            max_pool_connections=64,
            # Many S3 services other than AWS do not know the newer default checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def open_store(uri: str) -> Store:
    """Open a folder path or an ``s3://bucket/prefix`` URI; nothing is contacted yet.

    Raises:
        UserError: the URI has another scheme or names no bucket.
    """
    try:
        check(uri)
    except ValueError as error:
        raise UserError(str(error)) from None
    if uri.startswith("s3://"):
        return S3Store(uri)
    if not uri or "://" in uri:
        raise UserError(f"{uri!r}: unknown kind of storage; use a folder or s3://BUCKET/PREFIX")
    return LocalStore(uri)


def _download(uri: str) -> bytes:
    try:
        with urllib.request.urlopen(uri, timeout=60) as response:
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as error:
        if error.code >= 500 or error.code == 429:
            raise _Transient(f"{uri}: {_one_line(error)}") from error
        raise StorageError(f"{uri}: {_one_line(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            raise StorageError(f"{uri}: {_one_line(error)}") from error
        raise _Transient(f"{uri}: {_one_line(error)}") from error


def read_uri(uri: str) -> bytes:
    """Read one whole object from a path, ``s3://`` or ``https://``."""
    if uri.startswith("https://"):
        return _retry(lambda: _download(uri))
    folder, name = split(uri)
    return open_store(folder).read(name)
