"""Checks of a Ray cluster, by plain connections: the library imports no Ray."""

import http.client
import json
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from autopainter import uri
from autopainter.config import Config
from autopainter.doctor.findings import Finding, failed, ok, one_line, skipped, warning
from autopainter.doctor.limits import within
from autopainter.errors import UserError

_FORMS = "write http://HOST:8265 (the dashboard, which tells most) or HOST:6379"
_SEE_HEAD = "is the head up, and is this its address? Look at its pod and log, the service and the network policies"
_SET_TOKEN = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token (on Kubernetes the"
    " Secret autopainter-ray-token; elsewhere 'ray get-auth-token' on the head)"
)
_MOST_BYTES = 4 << 20
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True)
class Address:
    """Where a cluster is.

    Attributes:
        text: as it was given.
        host, port: of the connection.
        dashboard: whether it is the dashboard's; else that of the head's GCS.
        local: it stands for whatever runs on this machine, so there is nothing to connect to.
    """

    text: str
    host: str = ""
    port: int = 0
    dashboard: bool = False
    local: bool = False


def parse(text: str) -> Address:
    """Understand what stands in ``RAY_ADDRESS``.

    Raises:
        UserError: it is no address.
    """
    if text in ("auto", "local"):
        return Address(text, local=True)
    try:
        uri.check(text)
        parts = urllib.parse.urlsplit(text if "://" in text else f"gcs://{text}")
        dashboard = parts.scheme in ("http", "https")
        port = parts.port or ({"http": 80, "https": 443}[parts.scheme] if dashboard else None)
        if parts.scheme not in ("http", "https", "gcs") or not parts.hostname or not port:
            raise ValueError(_FORMS)
    except ValueError as error:
        raise UserError(f"the address of Ray: {error}") from None
    return Address(text.rstrip("/"), parts.hostname, port, dashboard)


def check(address: Address, config: Config | None, seconds: float) -> Iterator[Finding]:
    """Check that a cluster is reached, takes our token and has our version."""
    if address.local:
        yield skipped("Ray", f"{address.text}: the cluster of this machine, or a new one")
        return
    if address.dashboard:
        yield from _Dashboard(address, seconds).check(config)
        return
    try:
        within(seconds, lambda: socket.create_connection((address.host, address.port), timeout=seconds).close())
    except OSError as error:
        yield failed("Ray", f"{address.text}: {one_line(error)}", _SEE_HEAD)
        return
    yield ok("Ray", f"{address.text}: the port is open")
    yield skipped("Ray token", "only the dashboard tells: run doctor with --ray http://HOST:8265 as well")


class _Dashboard:
    """Ray's HTTP server."""

    def __init__(self, address: Address, seconds: float) -> None:
        self._address, self._seconds = address, seconds
        self._token, self._origin = _token()

    def check(self, config: Config | None) -> Iterator[Finding]:
        place = f"{self._address.text}/api/version"
        try:
            status, body = self._ask("/api/version", self._token)
        except (OSError, http.client.HTTPException) as error:
            yield failed("Ray", f"{place}: {one_line(error)}", _SEE_HEAD)
            return
        if status in (401, 403):
            yield ok("Ray", f"{self._address.text}: answers")
            yield self._refused(status)
            return
        try:
            theirs = str(json.loads(body)["ray_version"]) if status == 200 else ""
        except (ValueError, KeyError, TypeError):
            theirs = ""
        if not theirs:
            detail = f"{place}: HTTP {status}, which is no answer of Ray's dashboard"
            yield failed("Ray", detail, f"correct the address: {_FORMS}")
            return
        yield ok("Ray", f"{self._address.text}: answers")
        yield self._accepted()
        yield _version(theirs)
        yield self._resources(config)

    def _ask(self, path: str, token: str) -> tuple[int, bytes]:
        """Status and body of an answer."""
        request = urllib.request.Request(self._address.text + path)
        if token:
            request.add_header("Authorization", f"Bearer {token}")

        def answer() -> tuple[int, bytes]:
            try:
                with _opener.open(request, timeout=self._seconds) as response:
                    return response.status, response.read(_MOST_BYTES)
            except urllib.error.HTTPError as error:
                return error.code, b""

        return within(self._seconds, answer)

    def _refused(self, status: int) -> Finding:
        if status == 403:
            return failed("Ray token", f"the cluster refuses the token of {self._origin}", _SET_TOKEN)
        sent = f"the one of {self._origin} was sent" if self._token else self._origin
        return failed("Ray token", f"the cluster wants a token; {sent}", _SET_TOKEN)

    def _accepted(self) -> Finding:
        check = "Ray token"
        if not self._token:
            detail = "the cluster asks for none"
            return ok(check, detail) if self._address.host in _LOOPBACK else warning(check, detail, _OPEN)
        if self._ask("/api/version", "")[0] in (401, 403):
            return ok(check, f"the one of {self._origin} is accepted, requests without it are refused")
        return warning(check, f"one of {self._origin} was sent, but the cluster answers without it too", _OPEN)

    def _resources(self, config: Config | None) -> Finding:
        """Cores and GPUs of the cluster, and whether the workers find a place."""
        check = "Ray resources"
        try:
            _, body = self._ask("/api/v0/nodes?limit=1000", self._token)
            nodes = [node for node in json.loads(body)["data"]["result"]["result"] if node["state"] == "ALIVE"]
            cores, gpus = (sum(node["resources_total"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            return skipped(check, f"the dashboard does not list its nodes: {one_line(error)}")
        detail = f"{len(nodes)} nodes, {cores:g} cores, {gpus:g} GPUs"
        if config is None:
            return ok(check, detail)
        workers, each = config.cluster.workers, config.cluster.cpus_per_worker
        on_gpus = config.cluster.gpus or (config.cluster.gpus is None and gpus > 0)
        if workers * each > cores or (on_gpus and workers > gpus):
            wanted = f"{workers} workers with {each:g} cores" + (" and a GPU" if on_gpus else "") + " each"
            advice = "add nodes, or set cluster.workers to what fits; the run waits until there is room"
            return warning(check, f"{detail}; wanted: {wanted}", advice)
        return ok(check, f"{detail}; room for {workers} workers")


_OPEN = "set RAY_AUTH_MODE=token on the cluster too: whoever reaches this address can run programs there"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token is for the address that was named, and for no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _token() -> tuple[str, str]:
    """The token that Ray's clients would send, as Ray finds it, and where it is from or why there is none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return "", "none was sent because RAY_AUTH_MODE is not 'token'"
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return _sendable(token, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        return "", f"there is none to send: RAY_AUTH_TOKEN is not set, and {path}: {one_line(error)}"
    return _sendable(token, str(path))


def _sendable(token: str, origin: str) -> tuple[str, str]:
    """A token and its origin, unless no header can hold it: the error would show it."""
    if not token or not token.isascii() or not token.isprintable():
        return "", f"there is none to send: {origin} is empty or holds more than a token"
    return token, origin


def _version(theirs: str) -> Finding:
    check = "Ray version"
    try:
        ours = metadata.version("ray")
    except metadata.PackageNotFoundError:
        advice = "pip install -c constraints.txt -e '.[ray]' where jobs are started"
        return warning(check, f"the cluster has {theirs}, none is installed here", advice)
    if ours != theirs:
        advice = "use one version everywhere: the image of head, workers and submitter, and rayVersion in the manifests"
        return failed(check, f"the cluster has {theirs}, this machine {ours}", advice)
    return ok(check, f"{ours}, as the cluster's")
