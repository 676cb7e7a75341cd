"""One small interface over local folders and S3: the only module that knows where bytes live.

A *store* is opened on a folder or an ``s3://bucket/prefix`` and speaks in keys relative to it. Writes are atomic: a
reader sees the old object or the whole new one. Every S3 operation is retried with back-off inside a total time
budget; credentials and endpoint come from the environment or the platform's identity (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, web identity), never from a URI.
"""

import functools
import io
import logging
import os
import tempfile
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import boto3.exceptions
import botocore.config
import botocore.exceptions
import tenacity

from autopainter.errors import CorruptData, StorageError, UserError

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
    def upload(self, key: str, path: Path) -> None:
        """Create or replace an object with a file's content."""

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
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=".tmp-")
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"{self.locate(key)}: cannot be written: {error.strerror}") from None
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

    def write(self, key: str, data: bytes) -> None:
        self._write(key, data, os.replace)

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._write(key, data, os.link)  # link, unlike rename, refuses an existing target
        except FileExistsError:
            return self.read(key) == data
        return True

    def upload(self, key: str, path: Path) -> None:
        self.write(key, path.read_bytes())

    def list(self, prefix: str = "") -> list[StoredObject]:
        folder = self.root / prefix if prefix.endswith("/") or not prefix else (self.root / prefix).parent
        found = []
        for path in folder.rglob("*"):
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix) and not path.name.startswith(".tmp-") and path.is_file():
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


class S3Store(Store):
    """A prefix in a bucket of any S3-compatible service."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise UserError(f"{uri!r} names no bucket: write s3://BUCKET/PREFIX")
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""

    def _call(self, key: str, operation: Callable[[Any], T]) -> T:
        """Run one operation until it succeeds, fails for good, or has used up its time."""

        @tenacity.retry(
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
        def attempt() -> T:
            try:
                return operation(_client())
            except botocore.exceptions.ClientError as error:
                raise self._explain(key, error) from error
            except botocore.exceptions.NoCredentialsError as error:
                raise UserError(
                    f"{self.locate(key)}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                ) from error
            except botocore.exceptions.ParamValidationError as error:
                raise UserError(f"{self.locate(key)}: not a valid bucket or key") from error
            except (botocore.exceptions.BotoCoreError, boto3.exceptions.Boto3Error, OSError) as error:
                raise _Transient(f"{self.locate(key)}: {_one_line(error)}") from error

        return attempt()

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
        data = self._get(key, Range=f"bytes={start}-{stop - 1}")
        if len(data) != stop - start:
            raise CorruptData(f"{self.locate(key)}: got {len(data)} of the bytes {start} to {stop}")
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

    def upload(self, key: str, path: Path) -> None:
        self._call(key, lambda client: client.upload_file(str(path), self.bucket, self.prefix + key))

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
    if uri.startswith("s3://"):
        return S3Store(uri)
    if not uri or "://" in uri:
        raise UserError(f"{uri!r}: unknown kind of storage; use a folder or s3://BUCKET/PREFIX")
    return LocalStore(uri)


def split(uri: str) -> tuple[str, str]:
    """Split an object's URI into its folder's URI and its name: ``s3://b/p/x.json`` -> (``s3://b/p``, ``x.json``)."""
    folder, _, name = uri.rpartition("/")
    return folder or ("/" if uri.startswith("/") else "."), name


def read_uri(uri: str) -> bytes:
    """Read one whole object from a path, ``s3://`` or ``https://``."""
    if uri.startswith("https://"):
        try:
            with urllib.request.urlopen(uri, timeout=60) as response:
                body: bytes = response.read()
                return body
        except OSError as error:
            raise StorageError(f"{uri}: {_one_line(error)}") from error
    folder, name = split(uri)
    return open_store(folder).read(name)
