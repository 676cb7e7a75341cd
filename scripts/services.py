"""Real local services for the quickstart and the tests: an S3 server (SeaweedFS), a Ray cluster and TensorBoard.

Each is a child process that listens on 127.0.0.1 only, is ready when ``start()`` returns, and is gone with all its
descendants when ``stop()`` returns. It also dies with the Python process that started it, even if that one is
SIGKILLed, unless it was made with ``detach=True``: then ``record()`` it, for a later ``stop_recorded()``. Linux only.
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
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

HOST = "127.0.0.1"
MARKER = "AUTOPAINTER_SERVICE"  # environment variable that all processes of one service inherit, unique to it
PR_SET_PDEATHSIG = 1
_OWN_MOUNTS = ("unshare", "--mount")  # becomes a program with mounts of its own

# The kernel sends the PDEATHSIG when the *thread* that forked ends, so one thread that lives as long as the interpreter
# forks all services: they may then be (re)started from any short-lived thread.
_forker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="service-forker")
_prctl = ctypes.CDLL(None).prctl  # looked up here because little is safe between fork and exec
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback
_taken: set[int] = set()


class ServiceError(RuntimeError):
    """A service did not start or would not end; a failed start shows the tail of its log."""


def free_ports(count: int, twin: int = 0) -> list[int]:
    """``count`` consecutive free ports, never given twice; with ``twin``, the ports that much higher are free too."""

    def is_free(port: int) -> bool:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port not in _taken
        return False

    # Above Ray's default worker ports and below the ephemeral range, twins included: no outgoing connection takes one
    # of them before the service does. Not `random` itself: tests seed it, and would all look at the same ports.
    bases = list(range(20_000, 32_700 - twin - count, count))
    random.SystemRandom().shuffle(bases)
    for base in bases:
        ports = list(range(base, base + count))
        twins = [port + twin for port in ports if twin]
        if all(map(is_free, ports + twins)):
            _taken.update(ports + twins)
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


def _without_proxy(host: str) -> dict[str, str]:
    """What ``child_env`` sets already for HOST, for another loopback address."""
    direct = f"{HOST},127.0.0.0/8,{host}"
    return {} if host == HOST else {"no_proxy": direct, "NO_PROXY": direct}


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


def _family(root: int, marker: str) -> set[_Process]:
    """A service's processes: those in its session, those that carry its marker, and the descendants of either.

    Each alone misses some of Ray's: a job gets a session of its own, the dashboard's processes overwrite their
    environment with their title, and an orphan's parent is init.
    """

    def is_marked(pid: int) -> bool:
        with contextlib.suppress(OSError):  # ended, or another user's
            return f"{MARKER}={marker}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False

    everyone = {process for name in os.listdir("/proc") if name.isdigit() and (process := _look(int(name)))}
    pids = {process.pid for process in everyone if process.session == root or is_marked(process.pid)}
    while more := {process.pid for process in everyone if process.parent in pids} - pids:
        pids |= more
    return {process for process in everyone if process.pid in pids}


def _end(pid: int, started: int, marker: str, leftovers: Sequence[str], grace: float) -> None:
    """SIGTERM to the root, if there is a ``grace`` period, then SIGKILL to all that is left of its family."""

    def send(target: int, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signum)

    family = _family(pid, marker)
    deadline = time.monotonic() + grace
    if grace:
        send(pid, signal.SIGTERM)
        while _runs(pid, started) and time.monotonic() < deadline:
            time.sleep(0.05)
    # Also those that the first look found: an orphan may have lost what tells it.
    while left := {process for process in family if _runs(process.pid, process.started)} | _family(pid, marker):
        if time.monotonic() > deadline + 10:
            raise ServiceError(f"processes {sorted(left)} survive SIGKILL")
        for process in left:
            send(process.pid, signal.SIGKILL)
        time.sleep(0.05)
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
        if _runs(entry["pid"], entry["started"]):
            _end(**entry, grace=grace)
            ended.append(kind)
    pid_file.unlink(missing_ok=True)
    return ended


class Service:
    """One child process that leads its own session; subclasses say what to run and when it is ready."""

    kind = "service"
    death_signal = signal.SIGKILL
    ready_seconds = 60.0
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
        for process in _family(self.pid, self._handle["marker"]):
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
        command, extra, log = self._launch()
        marker, parent = secrets.token_hex(8), os.getpid()

        def die_with_parent() -> None:
            _prctl(PR_SET_PDEATHSIG, self.death_signal)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

        with log.open("wb") as output:
            self._process = _forker.submit(
                subprocess.Popen,
                command,
                env=child_env({**extra, MARKER: marker}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=None if self.detach else die_with_parent,
            ).result()
        process = _look(self.pid)  # None if it ended at once; _wait_ready() tells why
        started = process.started if process else 0
        self._handle = {"pid": self.pid, "started": started, "marker": marker, "leftovers": self._leftovers}
        try:
            self._wait_ready(log)
        except BaseException:  # also Ctrl-C
            self.kill()
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


class SeaweedFS(Service):
    """An S3 server with its data below ``data``, open only to the given (else random) key pair."""

    kind = "seaweedfs"

    def __init__(
        self,
        data: Path,
        buckets: Sequence[str] = ("datasets", "runs"),
        access_key: str | None = None,
        secret_key: str | None = None,
        port: int | None = None,
        detach: bool = False,
    ) -> None:
        super().__init__(detach)
        self.data, self.buckets = Path(data).absolute(), tuple(buckets)
        # S3, master, volume, filer, admin; each listens for gRPC on port + 10000 as well.
        self.port = port or free_ports(5, twin=10_000)[0]
        self.endpoint = f"http://{HOST}:{self.port}"
        self.env = {
            "AWS_ACCESS_KEY_ID": access_key or secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secret_key or secrets.token_hex(20),
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, **settings: Any) -> Any:
        """A boto3 client with this server's key pair; ``settings`` are those of ``botocore.config.Config``."""
        import boto3  # here because it is slow to import and Ray or TensorBoard alone do not need it
        import botocore.config

        common = {"signature_version": "s3v4", "s3": {"addressing_style": "path"}, "proxies": {}}
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.env["AWS_REGION"],
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            config=botocore.config.Config(**{**common, **settings}),
        )

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        logs = self.data / "log"
        logs.mkdir(parents=True, exist_ok=True)
        ports = {role: self.port + n for n, role in enumerate(("s3", "master", "volume", "filer", "admin"))}
        sockets = {**ports, **{f"{role}-grpc": port + 10_000 for role, port in ports.items()}}
        self._leftovers = [f"/tmp/seaweedfs-{name}-{port}.sock" for name, port in sockets.items()]
        command = [
            str(Path(sysconfig.get_path("scripts")) / "weed"), f"-logdir={logs}", "mini", f"-dir={self.data}",
            f"-ip={HOST}", f"-ip.bind={HOST}", *(f"-{role}.port={port}" for role, port in ports.items()),
            "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
            "-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false", "-volume.preStopSeconds=0",
            f"-bucket={','.join(self.buckets)}",
        ]  # fmt: skip
        # Without a key pair in its environment weed accepts any. The memory limit halves its size at no cost in CPU.
        keys = {name: self.env[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        return command, {**keys, "GOMEMLIMIT": "400MiB"}, logs / "weed.out"

    def _probe(self) -> None:
        client = self.client(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1})
        for bucket in self.buckets:
            client.head_bucket(Bucket=bucket)  # they are made a while after S3 first answers
            # After a crash, old objects may give errors for seconds although listing works: read one of each bucket.
            listed = client.list_objects_v2(Bucket=bucket, MaxKeys=50).get("Contents", [])
            for old in [entry["Key"] for entry in listed if entry["Size"]][:1]:
                client.get_object(Bucket=bucket, Key=old, Range="bytes=0-0")["Body"].read()
            sentinel = secrets.token_bytes(8)
            client.put_object(Bucket=bucket, Key=".ready", Body=sentinel)
            if client.get_object(Bucket=bucket, Key=".ready")["Body"].read() != sentinel:
                raise ServiceError(f"bucket {bucket} gives back other bytes")
            client.delete_object(Bucket=bucket, Key=".ready")


class _RayNode(Service):
    """What the head and the other nodes of a Ray cluster have in common: ``ray start --block``."""

    death_signal = signal.SIGTERM  # it then ends its children
    ready_seconds = 120.0
    _log: Path

    def _command(self, host: str, options: Mapping[str, str], *more: str) -> list[str]:
        return [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            f"--node-ip-address={host}", "--min-worker-port=0", "--max-worker-port=0",
            *(f"--{option}={value}" for option, value in options.items()), *more,
        ]  # fmt: skip

    def _probe(self) -> None:
        if "Ray runtime started" not in self._log.read_text():
            raise ServiceError("the node is not up")


class RayCluster(_RayNode):
    """A one-node Ray cluster that shares no port or folder with another one; its processes inherit ``env``.

    Clients need all of ``.env``, not just the address: a ``token`` is in it too. A ``RayNode`` can join it if ``host``
    is another loopback address than 127.0.0.1, such as 127.0.0.2.
    """

    kind = "ray"

    def __init__(
        self,
        num_cpus: int = 2,
        num_gpus: int | None = None,
        dashboard: bool = True,
        env: Mapping[str, str] | None = None,
        object_store_memory: int = 200 << 20,
        detach: bool = False,
        host: str = HOST,
        token: str | None = None,
    ) -> None:
        super().__init__(detach)
        self._host, self._token = host, token
        ports = map(str, free_ports(11))
        self._metrics = {"AUTOSCALER_METRIC_PORT": next(ports), "DASHBOARD_METRIC_PORT": next(ports)}
        options = ["port", "dashboard-port", "node-manager-port", "object-manager-port", "ray-client-server-port"]
        options += ["dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"]
        self._options = dict(zip([*options, "metrics-export-port"], ports, strict=True))
        self.address = f"{host}:{self._options['port']}"
        self.dashboard_url = f"http://{HOST}:{self._options['dashboard-port']}" if dashboard else None
        self._options |= {"num-cpus": str(num_cpus), "object-store-memory": str(object_store_memory)}
        self._options |= {} if num_gpus is None else {"num-gpus": str(num_gpus)}
        # Ray turns 127.0.0.1 into the machine's own address, and then listens to the whole network, unless it takes
        # the machine for a Mac, which has no clusters of several nodes. Both ends must agree.
        settings = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": str(int(host != HOST)), "RAY_AUTH_MODE": "disabled"}
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
        settings["RAY_USAGE_STATS_ENABLED"] = "0"
        # Some of Ray's own actors look for the cluster in the environment, else on the whole machine.
        settings |= {"RAY_ADDRESS": self.address, **_without_proxy(host)}
        self.extra = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", **settings, **(env or {})}
        self.env = {name: self.extra[name] for name in settings}
        self.env |= {"RAY_API_SERVER_ADDRESS": self.dashboard_url} if self.dashboard_url else {}

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        self.temp_dir = self._scratch()
        self._log = self.temp_dir / "ray-start.log"
        more = ("--head", f"--temp-dir={self.temp_dir}", f"--include-dashboard={self.dashboard_url is not None}")
        env = {**self.extra, **self._metrics, "TMPDIR": str(self.temp_dir)}  # what killed processes leave goes with it
        return self._command(self._host, self._options, *more), env, self._log

    def _probe(self) -> None:
        super()._probe()
        socket.create_connection((self._host, int(self._options["port"])), timeout=5).close()
        if self.dashboard_url:
            bearer = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            _http.open(urllib.request.Request(f"{self.dashboard_url}/api/jobs/", headers=bearer), timeout=10).close()


class RayNode(_RayNode):
    """A further node of a running ``RayCluster``, with a loopback address of its own.

    Drivers on this machine connect to the head. The node's processes see the file ``meminfo``, if there is one, as
    /proc/meminfo: Ray's memory monitor can be made to kill a worker without any memory being used. That needs
    ``can_mount()``.
    """

    kind = "ray-node"

    def __init__(
        self,
        cluster: RayCluster,
        host: str,
        num_cpus: int = 1,
        env: Mapping[str, str] | None = None,
        object_store_memory: int = 100 << 20,
        meminfo: Path | None = None,
        detach: bool = False,
    ) -> None:
        super().__init__(detach)
        options = ["node-manager-port", "object-manager-port", "dashboard-agent-listen-port"]
        options += ["dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port"]
        self._cluster, self.host, self._meminfo = cluster, host, meminfo
        self._options = dict(zip(options, map(str, free_ports(len(options))), strict=True))
        self._options |= {"num-cpus": str(num_cpus), "object-store-memory": str(object_store_memory)}
        self.extra = dict(env or {})

    @staticmethod
    def can_mount() -> bool:
        """Whether this process may show a file in another's place to its children, as root may on most machines."""
        attempt = [*_OWN_MOUNTS, "mount", "--bind", "/proc/version", "/proc/meminfo"]
        try:
            return subprocess.run(attempt, capture_output=True).returncode == 0
        except FileNotFoundError:
            return False

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        scratch = self._scratch()
        self._log = scratch / "ray-start.log"
        env = {**self._cluster.extra, **_without_proxy(self.host), **self.extra, "TMPDIR": str(scratch)}
        # It shares the head's session folder, whose log monitor reads all logs: another one would double each line.
        more = (f"--address={self._cluster.address}", "--include-log-monitor=False")
        command = self._command(self.host, self._options, *more)
        if self._meminfo:
            mount = 'mount --bind "$0" /proc/meminfo && exec "$@"'
            command = [*_OWN_MOUNTS, "sh", "-c", mount, str(self._meminfo), *command]
        return command, env, self._log


class TensorBoard(Service):
    """TensorBoard on a folder or an s3:// prefix; ``env`` brings the AWS_* settings."""

    kind = "tensorboard"

    def __init__(self, logdir: str | Path, env: Mapping[str, str], detach: bool = False) -> None:
        super().__init__(detach)
        self.env, self._port = dict(env), free_ports(1)[0]
        self._options = ["--logdir", str(logdir), "--host", HOST, "--port", str(self._port), "--reload_interval", "15"]
        self.url = f"http://{HOST}:{self._port}"

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        command = [sys.executable, "-m", "tensorboard.main", *self._options]
        return command, self.env, self._scratch() / "tensorboard.log"

    def _probe(self) -> None:
        _http.open(f"{self.url}/data/environment", timeout=10).close()
