"""A proxy before an S3 server that breaks some of its answers, for tests of what reads from storage.

It listens on 127.0.0.1 and passes requests on unchanged (their signature covers the Host header). Answers to GETs of
some keys suffer faults, each a fate that depends on the seed, the key, the end of the range and how often that was
asked for: no order of threads changes it. An answer is held in memory as a whole.
"""

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

HOST = "127.0.0.1"

FAULTS = ("cut", "reset", "stall", "trickle", "truncate", "flip", "refuse", "delay", "500", "503")
"""What may befall an answer.

cut: the connection is closed after some bytes of the body, whose Content-Length is honest. reset: the same with a TCP
reset. stall: after some bytes nothing more comes, but the connection stays open. trickle: after some bytes a few come
each second. truncate: a shorter body whose Content-Length fits it; Content-Range stays as it was. flip: up to three
bytes of the body are changed. refuse: the connection is closed before any answer. delay: the answer comes late. 500
and 503: an S3 error instead.
"""

_ERRORS = {"500": ("Internal Server Error", "InternalError"), "503": ("Slow Down", "SlowDown")}
_TRICKLE_SECONDS = 0.2
_NO_BODY = {"204", "304"}


class _Head(NamedTuple):
    """First line and headers of a message, the latter as they came."""

    first: str
    headers: list[tuple[str, str]]

    def get(self, name: str) -> str:
        return next((value for known, value in self.headers if known.lower() == name), "")

    def encode(self, **replaced: str) -> bytes:
        """The head with other values of some headers (an underscore for a hyphen), without those of value ''."""
        changed = {name.lower().replace("_", "-"): value for name, value in replaced.items()}
        kept = [(name, value) for name, value in self.headers if name.lower() not in changed]
        lines = [f"{name}: {value}" for name, value in [*kept, *changed.items()] if value]
        return "\r\n".join([self.first, *lines, "", ""]).encode("latin-1")


class FaultyProxy:
    """A context manager: the proxy listens while it is open. Its attributes may be changed meanwhile.

    Args:
        upstream: endpoint of the S3 server, ``http://HOST:PORT``.
        rates: probability of each kind of fault, of ``FAULTS``; together at most 1.
        seed: of everything random.
        pattern: regular expression that the path of an object must match to suffer faults.
        script: faults of the first answers, in order, before the rates apply; ``""`` for none.
        damaged: paths and, of each, the byte of the object that is changed in every answer that holds it.
        delay_seconds: longest delay.

    Attributes:
        down: while it is set, every request, of whatever method and path, is answered with 503 and goes no further.
        injected: how many faults of each kind there were; ``damaged`` and ``down`` are two more kinds.
        asked: path and Range of each GET that matches the pattern, in order.
    """

    def __init__(
        self,
        upstream: str,
        rates: Mapping[str, float] | None = None,
        seed: int = 0,
        pattern: str = r"\.tar$",
        script: Sequence[str] = (),
        damaged: Mapping[str, int] | None = None,
        delay_seconds: float = 0.3,
    ) -> None:
        address = urllib.parse.urlsplit(upstream)
        self._upstream = address.hostname, address.port
        self.pattern, self.delay_seconds, self.down = pattern, delay_seconds, False
        self.begin(rates or {}, seed, script, damaged or {})
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)

    def begin(
        self,
        rates: Mapping[str, float],
        seed: int = 0,
        script: Sequence[str] = (),
        damaged: Mapping[str, int] | None = None,
    ) -> None:
        """Begin anew with other faults; all counts are zero."""
        unknown = {*rates, *filter(None, script)} - set(FAULTS)
        if unknown or sum(rates.values()) > 1 + 1e-9:
            raise ValueError(f"rates: must be of {', '.join(FAULTS)} and together at most 1, got {dict(rates)}")
        self.rates, self.seed, self.script, self.damaged = dict(rates), seed, list(script), dict(damaged or {})
        self.injected: Counter[str] = Counter()
        self.asked: list[tuple[str, str]] = []
        self._times: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connected, HOST, 0, family=socket.AF_INET), self._loop
        ).result()
        self.url = f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        if self._server:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        far: asyncio.StreamWriter | None = None
        # A client that goes away, a server that does, or our own end: all are the end of this connection.
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            try:
                far_reader, far = await asyncio.open_connection(*self._upstream)
                while await self._exchange(reader, writer, far_reader, far):
                    pass
            finally:
                self._connections.discard(task)
                for end in (writer, far) if far else (writer,):
                    end.close()

    async def _exchange(
        self,
        near: asyncio.StreamReader,
        answer_to: asyncio.StreamWriter,
        far: asyncio.StreamReader,
        ask: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer; whether the connection may be used again."""
        request = await _read_head(near)
        if request.get("expect"):
            answer_to.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        sent = await near.readexactly(int(request.get("content-length") or 0))
        method, target, _ = request.first.split(" ", 2)
        if self.down:
            self.injected["down"] += 1
            head, error = _error("503")
            answer_to.write(head.encode() + (b"" if method == "HEAD" else error))
            await answer_to.drain()
            return True
        ask.write(request.encode(expect="") + sent)
        answer, body = await _read_answer(far, method == "HEAD")
        path = urllib.parse.unquote(urllib.parse.urlsplit(target).path)
        length = answer.get("content-length") if method == "HEAD" else str(len(body))
        whole = {"content_length": length, "transfer_encoding": ""}
        if method != "GET" or not re.search(self.pattern, path):
            answer_to.write(answer.encode(**whole) + body)
            await answer_to.drain()
            return True
        body = self._damage(path, answer, body)
        fault, fate, scripted = self._choose(path, request.get("range"))
        # By script in the middle of the body, so that each is a fault; at random anywhere, from the first byte on.
        middle = range(len(body) // 4, len(body) - len(body) // 4) if scripted else range(len(body))
        place = fate.choice(middle) if middle else 0
        return await self._answer(fault, fate, place, near, answer_to, answer, whole, body)

    def _choose(self, path: str, ranged: str) -> tuple[str, random.Random, bool]:
        """The fault of the next answer, '' for none, the random numbers for the rest of it, and if it is by script."""
        self.asked.append((path, ranged))
        name = f"{path}:{ranged.rpartition('-')[2]}"
        self._times[name] += 1
        fate = random.Random(f"{self.seed}:{name}:{self._times[name]}")
        if self.script:
            return self.script.pop(0), fate, True
        chance = fate.random()
        for kind, rate in self.rates.items():
            chance -= rate
            if chance < 0:
                return kind, fate, False
        return "", fate, False

    def _damage(self, path: str, answer: _Head, body: bytes) -> bytes:
        held = re.match(r"bytes (\d+)-", answer.get("content-range"))
        place = self.damaged.get(path, -1) - int(held[1] if held else 0)
        if not 0 <= place < len(body):
            return body
        self.injected["damaged"] += 1
        return _flipped(body, place)

    async def _answer(
        self,
        fault: str,
        fate: random.Random,
        place: int,
        near: asyncio.StreamReader,
        to: asyncio.StreamWriter,
        head: _Head,
        whole: dict[str, str],
        body: bytes,
    ) -> bool:
        """Answer with a fault, at this place of the body; whether the connection may be used again."""
        if fault:
            self.injected[fault] += 1
        if fault == "refuse":
            return False
        if fault in _ERRORS:
            (head, body), whole = _error(fault), {}
        elif fault == "truncate":
            body = body[:place]
            whole["content_length"] = str(len(body))
        elif fault == "flip" and body:
            for flipped in fate.sample(range(len(body)), min(len(body), fate.randint(1, 3))):
                body = _flipped(body, flipped)
        elif fault == "delay":
            await asyncio.sleep(fate.random() * self.delay_seconds)
        sent = place if fault in ("cut", "reset", "stall", "trickle") else len(body)
        to.write(head.encode(**whole) + body[:sent])
        await to.drain()
        if fault == "reset":
            to.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            to.transport.abort()
        elif fault == "trickle":
            for byte in range(sent, len(body)):
                await asyncio.sleep(_TRICKLE_SECONDS)
                to.write(body[byte : byte + 1])
                await to.drain()
        elif fault == "stall":
            await near.read()  # until the client gives up
        return fault not in ("cut", "reset", "stall")


def _error(status: str) -> tuple[_Head, bytes]:
    """Head and body of an S3 error."""
    words, code = _ERRORS[status]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    return _Head(f"HTTP/1.1 {status} {words}", headers), body


def _flipped(body: bytes, place: int) -> bytes:
    return body[:place] + bytes([body[place] ^ 0x55]) + body[place + 1 :]


async def _read_head(source: asyncio.StreamReader) -> _Head:
    lines = (await source.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
    return _Head(lines[0], headers)


async def _read_answer(source: asyncio.StreamReader, to_head: bool) -> tuple[_Head, bytes]:
    """Read one whole answer; a chunked body is put together."""
    head = await _read_head(source)
    if to_head or head.first.split(" ")[1] in _NO_BODY:
        return head, b""
    if head.get("transfer-encoding").lower() != "chunked":
        return head, await source.readexactly(int(head.get("content-length") or 0))
    body = bytearray()
    while size := int((await source.readline()).split(b";")[0], 16):
        body += (await source.readexactly(size + 2))[:-2]
    await source.readuntil(b"\r\n")
    return head, bytes(body)
