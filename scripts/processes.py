"""Child processes that never outlive who started them.

A ``Service`` listens on 127.0.0.1 only, is ready when ``start()`` returns, and is gone with all its descendants when
``stop()`` returns. It also dies with the Python process that started it, even if that one is SIGKILLed, unless it was
made with ``detach=True``: then ``record()`` it, for a later ``stop_recorded()``. Linux only.
"""

import contextlib
import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

HOST = "127.0.0.1"
MARKER = "AUTOPAINTER_SERVICE"  # environment variable that all processes of one service inherit, unique to it
PR_SET_PDEATHSIG = 1

# The kernel sends the PDEATHSIG when the *thread* that forked ends, so one thread that lives as long as the interpreter
# forks all services: they may then be (re)started from any short-lived thread.
_forker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="service-forker")
_prctl = ctypes.CDLL(None).prctl  # looked up here because little is safe between fork and exec
_taken: dict[int, socket.socket] = {}


class ServiceError(RuntimeError):
    """A service did not start or would not end; a failed start shows the tail of its log."""


def free_ports(count: int, twin: int = 0) -> list[int]:
    """``count`` consecutive free ports; with ``twin``, the ports that much higher are free too.

    No port is given twice as long as the process that asked for it lives, to another one neither.
    """

    def take(port: int) -> bool:
        if port in _taken:
            return False
        ours = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe, contextlib.suppress(OSError):
            ours.bind(f"\0autopainter-port-{port}")  # a name that the kernel frees when we end
            probe.bind(("", port))
            _taken[port] = ours
            return True
        ours.close()
        return False

    # Above Ray's default worker ports and below the ephemeral range, twins included: no outgoing connection takes one
    # of them before the service does. Not `random` itself: tests seed it, and would all look at the same ports.
    bases = list(range(20_000, 32_700 - twin - count, count))
    random.SystemRandom().shuffle(bases)
    for base in bases:
        ports = list(range(base, base + count))
        twins = [port + twin for port in ports if twin]
        if all(map(take, ports + twins)):
            return ports
    raise ServiceError(f"no {count} consecutive free ports")


def child_env(extra: Mapping[str, str]) -> dict[str, str]:
    """Our environment plus ``extra``, without the user's own S3 account, Ray cluster and proxy.

    A left-over AWS_SESSION_TOKEN or AWS_ENDPOINT_URL_S3, say, would mix with the settings of the local server.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_") and name != "RAY_ADDRESS"}
    no_proxy = own.get("no_proxy") or own.get("NO_PROXY")
    direct = f"{no_proxy},{HOST}" if no_proxy else HOST
    return {**own, "no_proxy": direct, "NO_PROXY": direct, **extra}


class _Process(NamedTuple):
    pid: int
    parent: int
    session: int
    started: int  # clock ticks since boot: tells a process from a later one with the same pid


def _look(pid: int) -> _Process | None:
    """A process that runs; None if it ended, also if it is a zombie."""
    try:
        # The command's name, in parentheses, may hold anything: count the fields from its end.
        state, parent, _, session, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else _Process(pid, int(parent), int(session), int(rest[15]))


def _runs(pid: int, started: int) -> bool:
    process = _look(pid)
    return process is not None and process.started == started


def _family(root: int, started: int, marker: str) -> set[_Process]:
    """A service's processes: those in its session, those that carry its marker, and the descendants of either.

    Each alone misses some of Ray's: a job gets a session of its own, the dashboard's processes overwrite their
    environment with their title, and an orphan's parent is init. The kernel gives no pid again while a session has it,
    so if the root's belongs to a later process, the session has ended.
    """

    def is_marked(pid: int) -> bool:
        with contextlib.suppress(OSError):  # ended, or another user's
            return f"{MARKER}={marker}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False

    everyone = {process for name in os.listdir("/proc") if name.isdigit() and (process := _look(int(name)))}
    session = None if any(process.pid == root and process.started != started for process in everyone) else root
    pids = {process.pid for process in everyone if process.session == session or is_marked(process.pid)}
    while more := {process.pid for process in everyone if process.parent in pids} - pids:
        pids |= more
    return {process for process in everyone if process.pid in pids}


def _end(pid: int, started: int, marker: str, leftovers: Sequence[str], grace: float) -> bool:
    """SIGTERM to the root, if there is a ``grace`` period, then SIGKILL to all that is left; whether any ran."""

    def send(target: int, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signum)

    family = _family(pid, started, marker)
    deadline = time.monotonic() + grace
    if grace and _runs(pid, started):
        send(pid, signal.SIGTERM)
        while _runs(pid, started) and time.monotonic() < deadline:
            time.sleep(0.05)
    # Also those that the first look found: an orphan may have lost what tells it.
    while left := {one for one in family if _runs(one.pid, one.started)} | _family(pid, started, marker):
        if time.monotonic() > deadline + 120:
            raise ServiceError(f"processes {sorted(left)} survive SIGKILL")
        for process in left:
            send(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    _remove(leftovers)
    return bool(family)


def _remove(leftovers: Sequence[str]) -> None:
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(path)


def stop_recorded(pid_file: Path, grace: float = 20) -> list[str]:
    """End the services in a file that ``record()`` wrote, last one first, and delete it; returns the kinds ended."""
    ended = []
    for line in reversed(pid_file.read_text().splitlines() if pid_file.exists() else []):
        entry = json.loads(line)
        kind = entry.pop("kind")
        if _end(**entry, grace=grace):
            ended.append(kind)
    pid_file.unlink(missing_ok=True)
    return ended


class Service:
    """One child process that leads its own session; subclasses say what to run and when it is ready."""

    kind = "service"
    death_signal = signal.SIGKILL
    ready_seconds = 600.0  # a bound on hanging, far above what any takes on a busy machine
    stop_seconds = 20.0

    def __init__(self, detach: bool) -> None:
        self.detach = detach
        self._process: subprocess.Popen[bytes] | None = None
        self._handle: dict[str, Any] = {}
        self._leftovers: list[str] = []

    @property
    def pid(self) -> int:
        """Process id; also that of its session and process group."""
        if self._process is None:
            raise ServiceError(f"{self.kind} is not running")
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code of its first process if that has ended, else None; ``kill()`` then clears up after it."""
        return self._process.poll() if self._process is not None else None

    def pids(self, name: str) -> list[int]:
        """Its processes whose program has this name (the kernel keeps 15 characters of it)."""
        found = []
        for process in _family(self.pid, self._handle["started"], self._handle["marker"]):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if Path(f"/proc/{process.pid}/comm").read_text().strip() == name:
                    found.append(process.pid)
        return found

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        """Prepare a start: the command, its environment on top of ours, and the file for its output."""
        raise NotImplementedError

    def _probe(self) -> None:
        """Raise anything as long as the service is not ready."""
        raise NotImplementedError

    def start(self) -> Self:
        """Start and wait until ready; after ``stop()`` or ``kill()`` it comes back at the same address."""
        if self._process is not None:
            raise ServiceError(f"{self.kind} already runs")
        marker, parent = secrets.token_hex(8), os.getpid()

        def die_with_parent() -> None:
            _prctl(PR_SET_PDEATHSIG, self.death_signal)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

        def fork(command: list[str], extra: Mapping[str, str], log: Path) -> None:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    command,
                    env=child_env({**extra, MARKER: marker}),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=None if self.detach else die_with_parent,
                )
            process = _look(self.pid)  # None if it ended at once; _wait_ready() tells why
            started = process.started if process else 0
            self._handle = {"pid": self.pid, "started": started, "marker": marker, "leftovers": self._leftovers}

        try:
            command, extra, log = self._launch()
            _forker.submit(fork, command, extra, log).result()
            self._wait_ready(log)
        except BaseException:  # also Ctrl-C
            _forker.submit(int).result()  # Ctrl-C has not reached that thread: what it was to fork is there now
            self.kill()
            _remove(self._leftovers)
            raise
        return self

    def _wait_ready(self, log: Path) -> None:
        deadline = time.monotonic() + self.ready_seconds
        while True:
            try:
                return self._probe()
            except Exception as error:  # whatever a service that is half up answers
                code = self._process.poll() if self._process else None
                if code is not None or time.monotonic() > deadline:
                    state = f"not ready, {error!r}" if code is None else f"ended with code {code}"
                    tail = log.read_text(errors="replace")[-3000:]
                    raise ServiceError(f"{self.kind} {state}; the tail of its log:\n{tail}") from error
            time.sleep(0.1)

    def stop(self) -> None:
        """End all its processes: politely, then by force. Does nothing if it does not run."""
        self._finish(self.stop_seconds)

    def kill(self) -> None:
        """SIGKILL all its processes, as in a crash."""
        self._finish(0)

    def _finish(self, grace: float) -> None:
        if self._process is not None:
            _end(**self._handle, grace=grace)
            self._process.wait()
            self._process = None

    def record(self, pid_file: Path) -> None:
        """Append to a file what ``stop_recorded()`` needs to end this service from another process."""
        with pid_file.open("a") as file:
            file.write(json.dumps({"kind": self.kind, **self._handle}) + "\n")

    def _scratch(self) -> Path:
        """A folder that is removed when the service ends."""
        # Not below $TMPDIR: Ray makes unix sockets deep inside, and their paths may have 107 bytes.
        self._leftovers = [tempfile.mkdtemp(prefix=f"ap-{self.kind}-", dir="/tmp")]
        return Path(self._leftovers[0])

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None or not self.detach:
            self.stop()
