"""The command that serves metrics: metrics."""

import logging
import threading
from pathlib import Path

import click

from autopainter import logs
from autopainter.errors import UserError

log = logging.getLogger(__name__)


@click.command()
@click.option("--folder", required=True, type=click.Path(path_type=Path), metavar="FOLDER",
              help="As telemetry.metrics_folder of the run; it may still be empty.")  # fmt: skip
@click.option("--port", type=click.IntRange(1, 65535), default=9400, show_default=True, help="Port to listen on.")
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on; :: for IPv6.")
def metrics(folder: Path, port: int, host: str) -> None:
    """Serve the metrics of the workers of this machine to Prometheus, however often they are started again.

    http://HOST:PORT/metrics gives what the workers last wrote into FOLDER. Ends with SIGTERM or Ctrl-C.
    """
    from autopainter.host import stop_signals
    from autopainter.telemetry.metric_server import MetricsServer

    logs.setup()
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder; make it, or name the run's telemetry.metrics_folder")
    try:
        server = MetricsServer(folder, port, host)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot be listened on: {error.strerror}") from None
    stopped = threading.Event()
    with stop_signals(stopped.set):
        log.info("metrics of %s at http://%s:%d/metrics", folder, host, port)
        stopped.wait()
    server.close()
