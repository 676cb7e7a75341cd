"""The server behind the page: a sketch and colour hints come in, a painted picture goes out, nothing is kept.

Every request is whole in itself and stays in memory, so people who use one server at a time never meet each other's
pictures, and there are no sessions and temporary files to clean up.
"""

import asyncio
import errno
import io
import signal
import socket
from collections.abc import Awaitable, Callable, Set
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np
import PIL.Image
from aiohttp import web
from pydantic import Base64Bytes, BaseModel, ConfigDict, ValidationError

from autopainter.data import pictures
from autopainter.data.pictures import Image
from autopainter.errors import UserError
from autopainter.paint import Painter, check_layer
from autopainter.serve import visitors

WAITING = 8
"""Requests that are read, wait or are painted at one time; one more is refused."""

_EDGE = 1024  # longest edge of the page's canvas, if the run was not trained on larger pictures
_BYTES_PER_PIXEL = 10  # of a request: two PNGs that do not compress, 3 + 4 bytes a pixel, in base64
_READ_SECONDS = 30.0  # a client that sends nothing may not hold a place for ever
_SHUTDOWN_SECONDS = 2.0
_HEADERS = {
    # The browser itself refuses whatever the page would load from or send to elsewhere.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Order(BaseModel):
    """What the page asks for.

    Attributes:
        size: length in pixels that the longer edge is resized to before it is painted, one of ``Studio.sizes``.
        sketch: PNG, dark lines on white or on nothing.
        hints: PNG of the same shape; a pixel is a hint where alpha is at least 128. None: no hints.
    """

    model_config = ConfigDict(extra="forbid")

    size: int
    sketch: Base64Bytes
    hints: Base64Bytes | None = None


class Studio:
    """A painter, and the sizes at which it paints what the page sends.

    Attributes:
        size: edge in pixels of the pictures that it was trained on, which it paints best.
        sizes: sizes to choose from, ascending.
        edge: longest edge in pixels of a sketch that is taken.
    """

    def __init__(self, painter: Painter) -> None:
        self._painter = painter
        self.size = painter.config.data.image_size
        self.edge = max(_EDGE, self.size)
        self.sizes = [size for size in (self.size // 2, self.size, 2 * self.size, 4 * self.size) if size <= self.edge]

    def about(self) -> dict[str, object]:
        """What the page says about the painter and needs to know."""
        return {"run": self._painter.config.run.name, "step": self._painter.step,
                "size": self.size, "sizes": self.sizes, "edge": self.edge}  # fmt: skip

    def paint(self, order: bytes) -> bytes:
        """Paint as ``autopainter paint --size`` would.

        Args:
            order: an ``Order`` as JSON.

        Returns:
            PNG, RGB, its longer edge of the size asked for.

        Raises:
            UserError: what was asked for cannot be painted.
        """
        try:
            asked = Order.model_validate_json(order)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise UserError(f"{'.'.join(map(str, first['loc'])) or 'request'}: {first['msg']}") from None
        if asked.size not in self.sizes:
            raise UserError(f"size: must be one of {', '.join(map(str, self.sizes))}, got {asked.size}")
        sketch = cv2.cvtColor(self._read("sketch", asked.sketch, pictures.decode), cv2.COLOR_RGB2GRAY)
        if sketch.min() == 255:
            raise UserError("The sketch is blank: draw lines or open a picture.")
        shape = pictures.scaled(sketch, asked.size)
        hints = None
        if asked.hints is not None:
            layer = self._read("hints", asked.hints, _decode_layer)
            if layer.shape[:2] != sketch.shape:
                raise UserError(
                    f"hints: {layer.shape[1]}x{layer.shape[0]}, the sketch is"
                    f" {sketch.shape[1]}x{sketch.shape[0]}: must be equal"
                )
            # No filter, as in autopainter.sketches: a hint's edge must not mix with the nothing around it.
            hints = cv2.resize(layer, shape, interpolation=cv2.INTER_NEAREST)
        painted = self._painter.paint(pictures.resize(sketch, *shape), hints)
        return cv2.imencode(".png", cv2.cvtColor(painted, cv2.COLOR_RGB2BGR))[1].tobytes()

    def _read(self, name: str, data: bytes, decode: Callable[[bytes], Image]) -> Image:
        """Pixels of a PNG, whose size is checked before it is decoded."""
        try:
            pictures.check_pixels(data)
            with PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if max(image.size) > self.edge:
                    raise UserError(f"{image.width}x{image.height}; at most {self.edge}x{self.edge} are taken")
            return decode(data)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except MemoryError:
            raise
        except Exception:  # whatever a decoder makes of damaged bytes
            raise UserError(f"{name}: must be a whole PNG") from None


def _decode_layer(data: bytes) -> Image:
    with PIL.Image.open(io.BytesIO(data)) as image:
        return check_layer(np.array(image.convert("RGBA")))


class _Handlers:
    """The requests that are answered."""

    def __init__(self, studio: Studio, thread: ThreadPoolExecutor) -> None:
        self._studio, self._thread, self._waiting = studio, thread, 0

    async def about(self, request: web.Request) -> web.Response:
        return web.json_response(self._studio.about())

    async def paint(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # which no page of another site may send here
            raise web.HTTPUnsupportedMediaType(text="a request to paint must be application/json")
        if self._waiting >= WAITING:
            raise web.HTTPServiceUnavailable(text="The painter is busy with others; try again in a moment.")
        self._waiting += 1
        try:
            async with asyncio.timeout(_READ_SECONDS):
                order = await request.read()
            painted = await asyncio.get_running_loop().run_in_executor(self._thread, self._studio.paint, order)
        except TimeoutError:
            raise web.HTTPRequestTimeout(text=f"the request did not come within {_READ_SECONDS:.0f} s") from None
        except web.RequestPayloadError:
            raise web.HTTPBadRequest(text="the request is not encoded as it says") from None
        except UserError as error:
            raise web.HTTPUnprocessableEntity(text=str(error)) from None
        finally:
            self._waiting -= 1
        return web.Response(body=painted, content_type="image/png")


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address; port 0 takes a free one.

    Raises:
        UserError: that cannot be.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except UnicodeError:
        reason = "no host name"
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        reason = "in use already; --port 0 takes a free one" if in_use else str(error.strerror)
    raise UserError(f"--host {host} --port {port}: cannot be listened on: {reason}")


def run(
    painter: Painter, listener: socket.socket, host: str, ready: Callable[[], object], leave: Callable[[int], NoReturn]
) -> None:
    """Serve the page until SIGINT (Ctrl-C) or SIGTERM.

    Args:
        painter: paints one picture at a time.
        listener: as ``listen`` gives it for ``host``.
        ready: called once requests are answered.
        leave: called with the signal's number, to end the process: when the connections are closed, or at once if
            another signal comes before. A picture may still be being painted, which nobody waits for.
    """
    app = application(Studio(painter), ThreadPoolExecutor(1, "painter"), visitors.names(listener, host))
    asyncio.run(_run(app, listener, ready, leave))


def application(studio: Studio, thread: ThreadPoolExecutor, names: Set[str] | None) -> web.Application:
    """The page, what it needs, and ``POST /paint``, an ``Order`` to a PNG, painted in ``thread``.

    Args:
        names: as ``visitors.names`` gives them.
    """
    handlers = _Handlers(studio, thread)
    app = web.Application(client_max_size=_BYTES_PER_PIXEL * studio.edge**2, middlewares=[visitors.only_to(names)])
    app.router.add_get("/", _send(_page_folder() / "index.html"))
    app.router.add_get("/about", handlers.about)
    app.router.add_post("/paint", handlers.paint)
    for file in _page_folder().iterdir():
        app.router.add_get(f"/page/{file.name}", _send(file))
    app.on_response_prepare.append(_add_headers)
    return app


async def _run(
    app: web.Application, listener: socket.socket, ready: Callable[[], object], leave: Callable[[int], NoReturn]
) -> None:
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[int] = loop.create_future()

    def end(number: int) -> None:
        if asked.done():
            leave(number)
        asked.set_result(number)

    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, end, each)
    # A picture that nobody waits for any more is not painted.
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, logger=visitors.log, shutdown_timeout=_SHUTDOWN_SECONDS
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        ready()
        number = await asked
    finally:
        await runner.cleanup()
    leave(number)


def _send(file: Path) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def send(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(file)

    return send


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def _page_folder() -> Path:
    return Path(str(resources.files("autopainter.serve"))) / "page"
