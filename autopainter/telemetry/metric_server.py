"""Serving the metrics that lie in a folder to Prometheus, in a worker or in a process of its own."""

import logging
import socket
import socketserver
import threading
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from autopainter.telemetry.metric_files import Recorded, decode, files_of
from autopainter.telemetry.metric_list import METRICS

log = logging.getLogger(__name__)

_PATH = "/metrics"
_REQUEST_SECONDS = 10.0


class FolderCollector(Collector):
    """What the workers' files in a folder say, read anew at each call.

    A file of an earlier start of a run, of a worker that has moved to another machine since, gives its counters only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._warned: dict[Path, int] = {}

    def collect(self) -> Iterable[Metric]:
        """The metrics that have values."""
        workers = sorted(self._read(), key=lambda worker: (worker.run, worker.rank))
        newest = {worker.run: worker.begun for worker in sorted(workers, key=lambda worker: worker.begun)}
        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
        families = {metric: kinds[metric.kind](metric.name, metric.help, labels=metric.label_names)
                    for metric in METRICS}  # fmt: skip
        for worker in workers:
            for (metric, labels), value in worker.values.items():
                if metric.kind == "counter" or worker.begun == newest[worker.run]:
                    own = (str(worker.rank),) if metric.of == "worker" else ()
                    families[metric].add_metric([worker.run, *own, *labels], value)
        return [family for family in families.values() if family.samples]

    def _read(self) -> Iterable[Recorded]:
        for path in files_of(self._folder):
            try:
                yield decode(path.read_bytes())
            except FileNotFoundError:
                continue  # its worker has just ended
            except (OSError, ValueError) as error:
                self._warn_once(path, error)

    def _warn_once(self, path: Path, error: Exception) -> None:
        """Warn of a file, and again only when it was written anew."""
        written = path.stat().st_mtime_ns if path.exists() else 0
        if self._warned.get(path) != written:
            log.warning("%s: passed over: %s", path, error)
        self._warned[path] = written


class MetricsServer:
    """The HTTP endpoint of a folder's metrics: /metrics and nothing else.

    Args:
        folder: need not exist yet.
        port: 0 takes a free one.
        host: address to listen on.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, folder: Path, port: int, host: str) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(FolderCollector(folder))
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._server = _Server(address, family, registry)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True  # of connections that linger, not of a port that is listened on
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: Any, family: socket.AddressFamily, registry: CollectorRegistry) -> None:
        self.address_family = family
        self.registry = registry
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that went away is nobody's trouble."""
        log.debug("a scrape failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REQUEST_SECONDS
    server_version, sys_version = "autopainter", ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != _PATH:
            self.send_error(HTTPStatus.NOT_FOUND, f"only {_PATH} is here")
            return
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        body = encode(self.server.registry)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """A line for each scrape is of no use."""
