"""Files of web sites, read whole."""

import http.client
import ssl
import urllib.error
import urllib.parse
import urllib.request

from autopainter.errors import StorageError, UserError, one_line
from autopainter.storage.retry import Transient, retry


def read(uri: str) -> bytes:
    """Read a file by its ``https://`` URL.

    Raises:
        UserError: no URL, or the site wants credentials for it.
        FileNotFoundError: the site has no such file.
        StorageError: the site kept failing.
    """
    _check(uri)
    return retry(lambda: _download(uri))


def _check(uri: str) -> None:
    try:
        parts = urllib.parse.urlsplit(uri)
        fit = bool(parts.hostname) and parts.port != 0  # asking for the port checks it
    except ValueError:
        fit = False
    if not fit or not uri.isascii() or not uri.isprintable() or " " in uri:
        raise UserError(f"{uri!r}: not a URL; write https://HOST/PATH, with %20 for a space")


def _download(uri: str) -> bytes:
    try:
        with urllib.request.urlopen(uri, timeout=60) as response:
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(f"{uri}: not found ({one_line(error)})") from error
        if error.code in (401, 403):
            raise UserError(
                f"{uri}: the site refuses it ({one_line(error)}); give a file that anybody may read"
            ) from error
        if error.code >= 500 or error.code == 429:
            raise Transient(f"{uri}: {one_line(error)}") from error
        raise StorageError(f"{uri}: {one_line(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            raise StorageError(f"{uri}: {one_line(error)}") from error
        raise Transient(f"{uri}: {one_line(error)}") from error
