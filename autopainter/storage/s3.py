"""S3 and the many services that speak its protocol."""

import contextlib
import functools
import io
import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions

from autopainter.errors import StorageError, UserError, one_line
from autopainter.storage.download import CONNECTION_ERRORS, Download, Version, status_of
from autopainter.storage.retry import TIMEOUT_SECONDS, Transient, retry
from autopainter.storage.store import Store, StoredObject

log = logging.getLogger(__name__)

MULTIPART_BYTES = 16 << 20
"""Objects larger than this are uploaded in parts, in parallel."""

PART_BYTES = 16 << 20
"""A large object is read in parts of so many bytes, ``CONNECTIONS`` of them at once."""

CONNECTIONS = 8

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # variables of a service other than AWS

_DELETE_KEYS = 1000  # what one request of S3 can delete
_BUSY = {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "InternalError", "ServiceUnavailable"}
_MISSING = {"404", "NoSuchKey", "NotFound"}
_REFUSED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "Forbidden"}

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
            except botocore.exceptions.InvalidRegionError as error:
                raise UserError(
                    f"{self.locate(key)}: {one_line(error)}; set AWS_REGION (or AWS_DEFAULT_REGION) to a region's name"
                ) from error
            except botocore.exceptions.ConfigParseError as error:
                raise UserError(
                    f"{self.locate(key)}: {one_line(error)}; mend it, or what AWS_CONFIG_FILE and"
                    " AWS_SHARED_CREDENTIALS_FILE name"
                ) from error
            except botocore.exceptions.EndpointProviderError as error:
                raise self._unfit_endpoint(key, error) from error
            except (botocore.exceptions.BotoCoreError, *CONNECTION_ERRORS) as error:
                raise Transient(f"{self.locate(key)}: {one_line(error)}{_forgotten_endpoint()}") from error
            except ValueError as error:  # of making the client
                raise self._unfit_endpoint(key, error) from None

        return retry(attempt, self._closed)

    def _unfit_endpoint(self, key: str, error: Exception) -> UserError:
        return UserError(f"{self.locate(key)}: {one_line(error)}; write AWS_ENDPOINT_URL as http://HOST:PORT")

    def _explain(self, key: str, error: botocore.exceptions.ClientError) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = status_of(error)
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
        return self._call(key, self._download(key, 0, None).attempt)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        return self._call(key, self._download(key, start, stop).attempt)

    def read_large(self, key: str, size: int) -> bytes:
        if size <= PART_BYTES:
            return self.read(key)
        whole = io.BytesIO(bytes(size))  # it gives out what lies in it without another copy
        with whole.getbuffer() as places, ThreadPoolExecutor(CONNECTIONS, "read") as threads:

            def part(first: int) -> Version:
                stop = min(first + PART_BYTES, size)
                download = self._download(key, first, stop)
                places[first:stop] = self._call(key, download.attempt)
                return download.version

            versions = set(threads.map(part, range(0, size, PART_BYTES)))
        if len(versions) > 1 or versions.pop().bytes not in (size, None):
            return self.read(key)  # it was replaced meanwhile, or is not of that size
        return whole.getvalue()

    def _download(self, key: str, start: int, stop: int | None) -> Download:
        return Download(self.locate(key), self.bucket, self.prefix + key, start, stop)

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
                if status_of(error) != 412:
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
                if status_of(error) != 501 and isinstance(self._explain(prefix, error), Transient):
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


def _custom_endpoint() -> bool:
    return any(os.environ.get(name) for name in _ENDPOINTS)  # boto3 takes an empty one for none


def _forgotten_endpoint() -> str:
    """What to add to a failure that may come from asking AWS for what is elsewhere."""
    return "" if _custom_endpoint() else "; if the bucket is not at AWS, set AWS_ENDPOINT_URL"


@functools.cache
def shared_client() -> Any:
    """One client a process: boto3 clients are thread-safe, and building one takes a good part of a second."""
    return boto3.client(
        "s3",
        region_name=os.environ.get("AWS_REGION") or None,  # which boto3 itself does not read
        config=botocore.config.Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if _custom_endpoint() else "auto"},
            retries={"total_max_attempts": 1},  # _call retries, the reading of the body included
            connect_timeout=min(10, TIMEOUT_SECONDS),
            read_timeout=TIMEOUT_SECONDS,
            max_pool_connections=64,
            # Many S3 services other than AWS do not know the newer default checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
