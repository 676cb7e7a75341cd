"""The command that serves the page to try a run on."""

import threading
import webbrowser
from typing import Any

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

        server.run(painter, listener, ready)
