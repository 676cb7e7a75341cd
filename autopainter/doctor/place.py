"""Checks of a storage: everything that a run does there, with objects of the doctor's own that are deleted again."""

import email.utils
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import botocore.exceptions

from autopainter.doctor.advice import SET_CLOCK, Unfit, advise, code_of
from autopainter.doctor.findings import Finding, Result, failed, ok, one_line, skipped, warning
from autopainter.doctor.folders import leaving_no_folder
from autopainter.doctor.limits import with_store, within
from autopainter.errors import UserError
from autopainter.storage import LocalStore, S3Store, Store, open_store
from autopainter.storage.s3 import MULTIPART_BYTES, shared_client

_CONTENT = bytes(range(256)) * 16
_RANGE = slice(1000, 2000)
_LARGE_BYTES = MULTIPART_BYTES + 1
_DENIED = {"AccessDenied", "403", "Forbidden"}  # the key is known, but may not do this
_WARN_SKEW_SECONDS = 30
_REFUSED_SKEW_SECONDS = 15 * 60
"""From here on S3 takes a signature for a replayed one."""


def check(label: str, uri: str, seconds: float) -> Iterator[Finding]:
    """Check a place that runs shall be kept in; nothing is left there.

    Args:
        label: beginning of the names of the checks.
        seconds: longest time of each of them.
    """
    with ExitStack() as stack:
        store = open_store(uri)
        if isinstance(store, LocalStore):
            stack.enter_context(leaving_no_folder(store.root))
        yield from _Place(label, uri, seconds).check(store)


class _Place:
    """One storage and the objects that are written there."""

    def __init__(self, label: str, uri: str, seconds: float) -> None:
        self._label, self._uri, self._seconds = label, uri, seconds
        self._folder = f"doctor-{secrets.token_hex(8)}"
        self._small, self._large = f"{self._folder}/small", f"{self._folder}/large"

    def check(self, store: Store) -> Iterator[Finding]:
        answers = self._step("answers", self._answers)
        yield answers
        if isinstance(store, S3Store):  # even if it refuses to answer: a wrong clock may be the reason
            yield self._clock(lambda: _date_of_answer(store), _REFUSED_SKEW_SECONDS)
        if answers.result == Result.FAILED:
            yield skipped(f"{self._label}: the rest", "write, read, ranges, conditional put, list, delete: not tried")
            return
        written = self._step("write", self._write)
        yield written
        if written.result == Result.OK:
            if isinstance(store, LocalStore):
                path = store.root / self._small
                yield self._clock(lambda: path.stat().st_mtime - time.time(), float("inf"))
            yield self._step("read", self._read)
            yield self._step("ranges", self._ranges)
            yield self._step("conditional put", self._create)
            yield self._step("list", self._list)
            yield self._step("large object", self._write_large)
        else:
            yield skipped(f"{self._label}: the rest", "read, ranges, conditional put, list: nothing was written")
        yield self._step("delete", self._delete)  # also what a write has left that failed halfway

    def _step(self, name: str, task: Callable[[Store], str]) -> Finding:
        check, began = f"{self._label}: {name}", time.monotonic()
        try:
            detail = with_store(self._uri, self._seconds, task)
        except Unfit as error:
            return failed(check, str(error), error.advice)
        except (OSError, UserError) as error:
            detail = f"{self._uri}: {one_line(error)}" if isinstance(error, TimeoutError) else one_line(error)
            return failed(check, detail, advise(error, self._uri))
        return ok(check, f"{detail}, {(time.monotonic() - began) * 1000:.0f} ms")

    def _mine(self, store: Store) -> dict[str, int]:
        """What is listed of the doctor's own objects; nothing if the key may not list."""
        try:
            return {entry.key: entry.bytes for entry in store.list(f"{self._folder}/")}
        except UserError as error:
            if code_of(error) not in _DENIED:
                raise
            return {}

    def _answers(self, store: Store) -> str:
        self._mine(store)
        return self._uri

    def _write(self, store: Store) -> str:
        store.write(self._small, _CONTENT)
        return f"{len(_CONTENT)} bytes"

    def _read(self, store: Store) -> str:
        if store.read(self._small) != _CONTENT:
            raise Unfit("other bytes came back than were written", "do not use this storage: it changes what it keeps")
        return "the same bytes came back"

    def _ranges(self, store: Store) -> str:
        if store.read_range(self._small, _RANGE.start, _RANGE.stop) != _CONTENT[_RANGE]:
            raise Unfit(
                "a range of an object is not what was written there", "do not use this storage, or the proxy before it"
            )
        return "a part of an object came back"

    def _create(self, store: Store) -> str:
        if store.create(self._small, b"another"):
            raise Unfit(
                "a put with If-None-Match: * replaced an object that is there",
                "use a storage with conditional puts: without them two starts of a run spoil each other's checkpoints",
            )
        if store.read(self._small) != _CONTENT:
            raise Unfit("a put that was refused changed the object", "do not use this storage")
        return "a second one is refused"

    def _list(self, store: Store) -> str:
        found = {entry.key: entry.bytes for entry in store.list(f"{self._folder}/")}
        if found != {self._small: len(_CONTENT)}:
            raise Unfit(
                f"what was written is not listed: {found}", "use a storage that lists an object once it is written"
            )
        return "what was written is listed"

    def _write_large(self, store: Store) -> str:
        data, began = os.urandom(_LARGE_BYTES), time.monotonic()
        store.write(self._large, data)
        rate = len(data) / 1e6 / (time.monotonic() - began)
        if store.size(self._large) != len(data) or store.read_range(self._large, len(data) - 9, len(data)) != data[-9:]:
            raise Unfit(
                f"{len(data) / 1e6:.1f} MB in parts did not arrive whole", "use a storage with multipart uploads"
            )
        return f"{len(data) / 1e6:.1f} MB written at {rate:.0f} MB/s"

    def _delete(self, store: Store) -> str:
        store.delete([self._small, self._large])
        store.abort_uploads(f"{self._folder}/", lambda key: True)
        if left := list(self._mine(store)):
            raise Unfit(f"{store.locate(left[0])} is still there", "delete it; use a storage that deletes at once")
        return "nothing is left"

    def _clock(self, ahead: Callable[[], float], refused_seconds: float) -> Finding:
        """Compare this machine's clock with that of the storage.

        Args:
            ahead: seconds that the storage is ahead.
            refused_seconds: difference from which on the storage does not work.
        """
        check = f"{self._label}: clock"
        try:
            seconds = within(self._seconds, ahead)
        except (OSError, botocore.exceptions.BotoCoreError) as error:
            return skipped(check, f"the storage does not tell the time: {one_line(error)}")
        detail = f"this machine is {abs(seconds):.0f} s {'behind' if seconds > 0 else 'ahead of'} the storage"
        if abs(seconds) > refused_seconds:
            return failed(check, detail, SET_CLOCK)
        if abs(seconds) > _WARN_SKEW_SECONDS:
            return warning(check, detail, SET_CLOCK)
        return ok(check, detail)


def _date_of_answer(store: S3Store) -> float:
    """Seconds that the storage's clock is ahead, by the Date of an answer; an error is one too."""
    before = time.time()
    try:
        answer = shared_client().head_bucket(Bucket=store.bucket)
    except botocore.exceptions.ClientError as error:
        answer = error.response
    date = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date", "")
    try:
        there = email.utils.parsedate_to_datetime(date).timestamp() + 0.5  # it tells whole seconds
    except ValueError:
        raise OSError("an answer without a date") from None
    return there - (before + time.time()) / 2
