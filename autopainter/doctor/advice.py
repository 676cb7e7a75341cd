"""What to do about an error of a storage."""

import errno
import os
from collections.abc import Iterator

import botocore.exceptions

from autopainter.errors import CorruptData

SET_CLOCK = "set this machine's clock (NTP; timedatectl), or the storage's: S3 refuses signatures of other times"

_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (on Kubernetes the Secret autopainter-s3)"
_RIGHTS = (
    "s3:ListBucket and s3:ListBucketMultipartUploads of the bucket, and s3:GetObject, s3:PutObject, s3:DeleteObject and"
    " s3:AbortMultipartUpload of its objects"
)
_BY_CODE = {
    "NoSuchBucket": "create the bucket, or correct its name",
    "InvalidAccessKeyId": f"correct {_KEYS}: the storage does not know this key",
    "SignatureDoesNotMatch": f"correct {_KEYS}: the secret does not belong to the key",
    "ExpiredToken": "get new temporary credentials: these have expired",
    "RequestTimeTooSkewed": SET_CLOCK,
    "NotImplemented": "use a storage that can do this; conditional puts (If-None-Match) keep checkpoints safe",
}
_REFUSED = f"correct {_KEYS}, or grant the key {_RIGHTS}"
_BY_ERRNO = {
    errno.ENOSPC: "free space there, or choose another folder",
    errno.EDQUOT: "free space there (its quota is used up), or choose another folder",
    errno.EROFS: "choose a folder that is not mounted read-only",
    errno.ENOTDIR: "choose another folder: a part of this path is a file",
}


class Unfit(Exception):
    """A storage answered without an error, but not as a run needs it.

    Attributes:
        advice: what to do.
    """

    def __init__(self, detail: str, advice: str) -> None:
        super().__init__(detail)
        self.advice = advice


def advise(error: BaseException, uri: str) -> str:
    """What to do about what a ``Store`` of this URI raised."""
    if not uri.startswith("s3://"):
        return _of_folder(error)
    if any(isinstance(cause, _NO_CREDENTIALS) for cause in _causes(error)):
        return f"set {_KEYS}, or give the pod's service account a role"
    if code := code_of(error):
        refused = isinstance(error, ValueError)  # UserError: another attempt would not help
        return _BY_CODE.get(code) or (_REFUSED if refused else "look at the storage's own log, and run doctor again")
    where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS (no AWS_ENDPOINT_URL)"
    return f"is the storage up, and is this its address: {where}? Look at its pods, network policies and proxies"


def code_of(error: BaseException) -> str:
    """S3's code of an error, ``""`` if the error is not an answer of S3."""
    for cause in _causes(error):
        if isinstance(cause, botocore.exceptions.ClientError):
            return str(cause.response.get("Error", {}).get("Code", ""))
    return ""


def is_about_content(error: BaseException) -> bool:
    """Whether an object is missing or not what it should be, though its storage does what was asked."""
    for cause in _causes(error):
        if isinstance(cause, FileNotFoundError | CorruptData):
            return True
        if isinstance(cause, OSError | botocore.exceptions.ClientError | botocore.exceptions.BotoCoreError):
            return False
    return True


_NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.ProfileNotFound,
)


def _of_folder(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "the file system hangs: look at its mount (dmesg, mount), or choose another folder"
    numbers = [cause.errno for cause in _causes(error) if isinstance(cause, OSError) and cause.errno]
    known = next((_BY_ERRNO[number] for number in numbers if number in _BY_ERRNO), None)
    return known or f"make it writable for uid {os.getuid()}, or choose another folder"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
