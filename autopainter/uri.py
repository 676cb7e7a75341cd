"""URIs of folders and objects: a path, ``s3://BUCKET/KEY`` or ``https://HOST/PATH``."""

import re

_USER_INFO = re.compile(r"^[a-z0-9+.-]+://[^/]*@", re.IGNORECASE)
_SIGNED = re.compile(
    r"^[a-z0-9+.-]+://[^?]*\?(.*&)?(sig|[^=&]*(signature|credential|token|key|password|secret)[^=&]*)=", re.IGNORECASE
)
"""A query with credentials; a folder's name may hold the same characters."""


def check(uri: str) -> str:
    """Return a URI that carries no credentials.

    Raises:
        ValueError: it does; the message does not repeat it.
    """
    if _USER_INFO.search(uri) or _SIGNED.search(uri):
        raise ValueError(
            "a URI must hold no credentials: it ends up in logs and checkpoints; set them in the environment,"
            " such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return uri


def place(uri: str) -> str:
    """Return a URI that names a place: what a variable without a value left of one would be a folder somewhere else.

    Raises:
        ValueError: it names none, or as ``check``.
    """
    if not uri.strip():
        raise ValueError("must not be empty; write a path or s3://BUCKET/KEY")
    if re.fullmatch(r"s3:/*|s3:///.*", uri):
        raise ValueError(f"{uri!r} names no bucket; write s3://BUCKET/KEY")
    if uri.startswith("~"):
        raise ValueError(f"{uri!r}: only a shell knows whose home that is; write the whole path")
    return check(uri)


def split(uri: str) -> tuple[str, str]:
    """Split an object's URI into its folder's URI and its name: ``s3://b/p/x.json`` -> (``s3://b/p``, ``x.json``)."""
    folder, _, name = uri.rpartition("/")
    return folder or ("/" if uri.startswith("/") else "."), name
