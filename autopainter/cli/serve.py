"""The command that serves the page to try a run on."""

import os
import signal
import sys
import threading
import webbrowser
from types import FrameType
from typing import Any, NoReturn

import click

from autopainter.cli.common import checkpoint_options
from autopainter.extras import need


@click.command()
@checkpoint_options
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True,
              help="Port to listen on; 0: any free one.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen on. Whoever reaches it may paint: there is no password.")  # fmt: skip
@click.option("--no-browser", is_flag=True, help="Only print the page's address.")
def serve(run_uri: str, step: Any, port: int, host: str, no_browser: bool) -> None:
    """Serve a page on this machine: draw or open a sketch, lay down colours, see it painted. Ctrl-C ends it."""
    signal.signal(signal.SIGTERM, _leave)  # which the kernel keeps from process 1 of a container if nobody handles it
    need("autopainter serve", "serve", "aiohttp")
    from autopainter.paint import Painter
    from autopainter.serve import server

    with server.listen(host, port) as listener:
        painter = Painter.load(run_uri, step)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}/"

        def ready() -> None:
            click.echo(f"{url} paints with step {painter.step} of {run_uri}; Ctrl-C ends it")
            if not no_browser:  # a browser that runs in the terminal returns only when it ends
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

        server.run(painter, listener, host, ready, _leave)


def _leave(number: int, frame: FrameType | None = None) -> NoReturn:
    """End the process with a signal's exit code, without the interpreter's end: that waits for the picture that is
    being painted, and torch aborts where it is interrupted.
    """
    newline = "\n" if number == signal.SIGINT else ""  # after the terminal's ^C
    print(f"{newline}autopainter: stopped; the same command continues", file=sys.stderr, flush=True)
    os._exit(128 + number)
