"""S3 and the many services that speak its protocol."""

import contextlib
import functools
import http.client
import io
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions
import urllib3.exceptions

from autopainter.errors import CorruptData, StorageError, UserError
from autopainter.storage.retry import TIMEOUT_SECONDS, Transient, one_line, retry
from autopainter.storage.store import Store, StoredObject

log = logging.getLogger(__name__)

MULTIPART_BYTES = 16 << 20
"""Objects larger than this are uploaded in parts, in parallel."""

SLOWEST_BYTES_PER_SECOND = 16 << 10
"""A body that comes slower than this for TIMEOUT_SECONDS is given up and continued over another connection."""

_PIECE_BYTES = 256 << 10  # the most that is taken from a connection between two looks at the clock
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

_CUSTOM_ENDPOINT = {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"}  # variables of a service other than AWS

_DELETE_KEYS = 1000  # what one request of S3 can delete
_BUSY = {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "InternalError", "ServiceUnavailable"}
_MISSING = {"404", "NoSuchKey", "NotFound"}
_REFUSED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "Forbidden"}

# What a connection may fail with; botocore itself reads the bodies of errors and lists, and passes the first two on.
_CONNECTION = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)

T = TypeVar("T")


class S3Store(Store):
    """A prefix in a bucket of any S3-compatible service."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        if not bucket:
            raise UserError(f"{uri!r} names no bucket: write s3://BUCKET/PREFIX")
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self._closed = threading.Event()

    def close(self) -> None:
        self._closed.set()

    def _call(self, key: str, operation: Callable[[Any], T]) -> T:
        """Run one operation until it succeeds, fails for good, or has used up its time."""

        def attempt() -> T:
            try:
                return operation(shared_client())
            except StorageError:
                raise
            except botocore.exceptions.ClientError as error:
                raise self._explain(key, error) from error
            except (
                botocore.exceptions.NoCredentialsError,
                botocore.exceptions.PartialCredentialsError,
                botocore.exceptions.ProfileNotFound,
            ) as error:
                raise UserError(
                    f"{self.locate(key)}: no credentials ({one_line(error)});"
                    " set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                ) from error
            except botocore.exceptions.ParamValidationError as error:
                raise UserError(f"{self.locate(key)}: not a valid bucket or key") from error
            except (botocore.exceptions.BotoCoreError, *_CONNECTION) as error:
                raise Transient(f"{self.locate(key)}: {one_line(error)}{_forgotten_endpoint()}") from error
            except ValueError as error:  # of making the client
                raise UserError(
                    f"{self.locate(key)}: {one_line(error)}; write AWS_ENDPOINT_URL as http://HOST:PORT"
                ) from None

        return retry(attempt, self._closed)

    def _explain(self, key: str, error: botocore.exceptions.ClientError) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = _status(error)
        if code == "NoSuchBucket":
            return UserError(f"{self.uri}: there is no bucket {self.bucket!r} at {shared_client().meta.endpoint_url}")
        if code in _REFUSED or status in (401, 403):
            return UserError(
                f"{self.locate(key)}: {shared_client().meta.endpoint_url} refused the credentials ({code});"
                f" check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights of that key{_forgotten_endpoint()}"
            )
        if code in _MISSING or status == 404:
            return FileNotFoundError(f"{self.locate(key)}: not found")
        if status >= 500 or status == 429 or code in _BUSY:
            return Transient(f"{self.locate(key)}: {code} (HTTP {status})")
        return StorageError(f"{self.locate(key)}: {one_line(error)}")

    def read(self, key: str) -> bytes:
        return self._call(key, _Download(self.locate(key), self.bucket, self.prefix + key, 0, None).attempt)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        return self._call(key, _Download(self.locate(key), self.bucket, self.prefix + key, start, stop).attempt)

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
                if _status(error) != 412:
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
            kind = Transient if error.get("Code") in _BUSY else StorageError
            raise kind(f"{self.locate('')}: {error.get('Key')} cannot be deleted: {error.get('Code')}")

    def abort_uploads(self, prefix: str, unwanted: Callable[[str], bool]) -> None:
        def pages(client: Any) -> list[dict[str, Any]]:
            paginator = client.get_paginator("list_multipart_uploads")
            try:
                found = paginator.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
                return [upload for page in found for upload in page.get("Uploads", ())]
            except botocore.exceptions.ClientError as error:
                if _status(error) != 501 and isinstance(self._explain(prefix, error), Transient):
                    raise
                # Not every service offers this, or grants it; without it the uploads stay until it expires them.
                log.debug("%s: unfinished uploads cannot be listed: %s", self.locate(prefix), one_line(error))
                return []

        for upload in self._call(prefix, pages):
            key = upload["Key"].removeprefix(self.prefix)
            if unwanted(key):
                with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
                    self._call(key, functools.partial(self._abort, upload))

    def _abort(self, upload: dict[str, Any], client: Any) -> None:
        client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])


class _Download:
    """Bytes of one version of an object, over as many answers as it takes: what has come is kept.

    Args:
        place: the object's URI, for messages.
        start: first byte.
        stop: end of the bytes; none: that of the object.
    """

    def __init__(self, place: str, bucket: str, key: str, start: int, stop: int | None) -> None:
        self._place, self._object = place, {"Bucket": bucket, "Key": key}
        self._start, self._stop = start, stop
        self._restart()

    def _restart(self) -> None:
        self._data = io.BytesIO()
        self._etag: str | None = None
        self._bytes: int | None = None  # size of the object, as far as an answer told it

    @property
    def _position(self) -> int:
        """The first byte that has not come yet."""
        return self._start + self._data.tell()

    def attempt(self, client: Any) -> bytes:
        """Ask for what is missing; all the bytes.

        Raises:
            Transient: some did not come.
            CorruptData: the object ends before ``stop``.
            botocore.exceptions.ClientError: another answer.
        """
        try:
            answer = client.get_object(**self._request())
        except botocore.exceptions.ClientError as error:
            if _status(error) == 412 or (_status(error) == 416 and self._stop is None):
                self._restart()
                raise self._transient("was replaced while it was read") from error
            if _status(error) == 416:
                raise CorruptData(
                    f"{self._place}: ends at or before byte {self._position}, expected {self._stop}"
                ) from error
            raise
        with answer["Body"] as body:
            self._receive(body, self._before(answer))
        return self._data.getvalue()

    def _request(self) -> dict[str, str]:
        request = dict(self._object)
        if self._position or self._stop is not None:
            request["Range"] = f"bytes={self._position}-{'' if self._stop is None else self._stop - 1}"
        if self._etag and not self._etag.startswith("W/"):  # a weak one never matches
            request["IfMatch"] = self._etag
        return request

    def _before(self, answer: dict[str, Any]) -> int:
        """Check what an answer holds; how many bytes come in it before the first one that is missing."""
        first, size = 0, answer.get("ContentLength")  # a server that ignores ranges sends the whole object
        if answer["ResponseMetadata"]["HTTPStatusCode"] == 206:
            held = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
            if held is None:
                raise self._transient(f"the answer has no valid Content-Range: {answer.get('ContentRange')!r}")
            first, size = int(held[1]), None if held[2] == "*" else int(held[2])
        etag = answer.get("ETag")
        if self._data.tell() and (etag, size) != (self._etag, self._bytes):
            self._restart()
            raise self._transient("was replaced while it was read")
        if size is not None and self._stop is not None and size < self._stop:
            raise CorruptData(f"{self._place}: ends at byte {size}, expected {self._stop}")
        if first > self._position:
            raise self._transient(f"the answer begins at byte {first}")
        self._etag, self._bytes = etag, size
        return self._position - first

    def _receive(self, body: urllib3.HTTPResponse, before: int) -> None:
        """Take a body, but for its first ``before`` bytes, as far as it comes."""
        stop = self._bytes if self._stop is None else self._stop
        began, received = time.monotonic(), 0
        while stop is None or self._position < stop:
            seconds = time.monotonic() - began
            if seconds > TIMEOUT_SECONDS:
                if received < seconds * SLOWEST_BYTES_PER_SECOND:
                    raise self._transient(f"no more than {received} bytes in {seconds:.0f} s")
                began, received = time.monotonic(), 0
            missing = _PIECE_BYTES if stop is None else before + stop - self._position
            try:
                piece = body.read1(min(missing, _PIECE_BYTES))
            except _CONNECTION as error:
                raise self._transient(one_line(error)) from error
            if not piece:
                break
            received += len(piece)
            self._data.write(memoryview(piece)[before:])
            before -= min(before, len(piece))
        if stop is not None and self._position < stop:
            raise self._transient("the body ended")

    def _transient(self, reason: str) -> Transient:
        stop = self._bytes if self._stop is None else self._stop
        return Transient(f"{self._place}: at byte {self._position} of {self._start} to {stop or 'its end'}: {reason}")


def _status(error: botocore.exceptions.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _forgotten_endpoint() -> str:
    """What to add to a failure that may come from asking AWS for what is elsewhere."""
    return "" if _CUSTOM_ENDPOINT & os.environ.keys() else "; if the bucket is not at AWS, set AWS_ENDPOINT_URL"


@functools.cache
def shared_client() -> Any:
    """One client a process: boto3 clients are thread-safe, and building one takes a good part of a second."""
    return boto3.client(
        "s3",
        region_name=os.environ.get("AWS_REGION"),  # which boto3 itself does not read
        config=botocore.config.Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if _CUSTOM_ENDPOINT & os.environ.keys() else "auto"},
            retries={"total_max_attempts": 1},  # _call retries, the reading of the body included
            connect_timeout=min(10, TIMEOUT_SECONDS),
            read_timeout=TIMEOUT_SECONDS,
            max_pool_connections=64,
            # Many S3 services other than AWS do not know the newer default checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
