"""One download from S3: bytes of one version of an object, over as many answers as it takes."""

import http.client
import io
import re
import time
from typing import Any, NamedTuple

import botocore.exceptions
import urllib3.exceptions

from autopainter.errors import CorruptData, one_line
from autopainter.storage.retry import TIMEOUT_SECONDS, Transient

SLOWEST_BYTES_PER_SECOND = 16 << 10
"""A body that comes slower than this for TIMEOUT_SECONDS is given up and continued over another connection."""

_PIECE_BYTES = 256 << 10  # the most that is taken from a connection between two looks at the clock
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

# What a connection may fail with; botocore itself reads the bodies of errors and lists, and passes the first two on.
CONNECTION_ERRORS = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)


class Version(NamedTuple):
    """Which version of an object answers came from: its ETag and its size, as far as they told them."""

    etag: str | None
    bytes: int | None


class Download:
    """Bytes of one version of an object, over as many answers as it takes: what has come is kept.

    Args:
        place: the object's URI, for messages.
        start: first byte.
        stop: end of the bytes; none: that of the object.

    Attributes:
        version: the version that they come from.
    """

    def __init__(self, place: str, bucket: str, key: str, start: int, stop: int | None) -> None:
        self._place, self._object = place, {"Bucket": bucket, "Key": key}
        self._start, self._stop = start, stop
        self._restart()

    def _restart(self) -> None:
        self._data = io.BytesIO()
        self.version = Version(None, None)

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
            if status_of(error) == 412 or (status_of(error) == 416 and self._stop is None):
                self._restart()
                raise self._transient("was replaced while it was read") from error
            if status_of(error) == 416:
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
        if (etag := self.version.etag) and not etag.startswith("W/"):  # a weak one never matches
            request["IfMatch"] = etag
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
        if self._data.tell() and Version(etag, size) != self.version:
            self._restart()
            raise self._transient("was replaced while it was read")
        if size is not None and self._stop is not None and size < self._stop:
            raise CorruptData(f"{self._place}: ends at byte {size}, expected {self._stop}")
        if first > self._position:
            raise self._transient(f"the answer begins at byte {first}")
        self.version = Version(etag, size)
        return self._position - first

    def _receive(self, body: urllib3.HTTPResponse, before: int) -> None:
        """Take a body, but for its first ``before`` bytes, as far as it comes."""
        stop = self.version.bytes if self._stop is None else self._stop
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
            except CONNECTION_ERRORS as error:
                raise self._transient(one_line(error)) from error
            if not piece:
                break
            received += len(piece)
            self._data.write(memoryview(piece)[before:])
            before -= min(before, len(piece))
        if stop is not None and self._position < stop:
            raise self._transient("the body ended")

    def _transient(self, reason: str) -> Transient:
        stop = self.version.bytes if self._stop is None else self._stop
        return Transient(f"{self._place}: at byte {self._position} of {self._start} to {stop or 'its end'}: {reason}")


def status_of(error: botocore.exceptions.ClientError) -> int:
    """The HTTP status that an error came with; 0 if there was no answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
