"""Real local services for the quickstart and the tests: an S3 server (SeaweedFS), a Ray cluster and TensorBoard."""

import re
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from processes import HOST, Service, ServiceError, free_ports

_OWN_MOUNTS = ("unshare", "--mount")  # becomes a program with mounts of its own
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback


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
        more = (
            "--head", f"--temp-dir={self.temp_dir}", f"--include-dashboard={self.dashboard_url is not None}",
            "--no-monitor",  # of the autoscaler, which has no nodes to add here
        )  # fmt: skip
        env = {**self.extra, **self._metrics, "TMPDIR": str(self.temp_dir)}  # what killed processes leave goes with it
        return self._command(self._host, self._options, *more), env, self._log

    def _probe(self) -> None:
        super()._probe()
        socket.create_connection((self._host, int(self._options["port"])), timeout=5).close()
        if self.dashboard_url:
            bearer = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            _http.open(urllib.request.Request(f"{self.dashboard_url}/api/jobs/", headers=bearer), timeout=10).close()


def show_memory(meminfo: Path, used: float) -> None:
    """Write what a ``RayNode`` is to see as /proc/meminfo: this share of the machine's memory is used."""
    text = (meminfo if meminfo.exists() else Path("/proc/meminfo")).read_text()
    total = re.search(r"MemTotal:\s+(\d+) kB", text)
    assert total is not None
    available = f"MemAvailable: {int(int(total[1]) * (1 - used)):16d} kB"
    # In one write, of the same length, into the same file: that one is mounted, and read several times a second.
    with meminfo.open("r+b" if meminfo.exists() else "wb", buffering=0) as file:
        file.write(re.sub(r"MemAvailable:\s+\d+ kB", available, text).encode())


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
        scratch = self._scratch()
        env = {**self.env, "TMPDIR": str(scratch)}  # it leaves notes of itself there
        return command, env, scratch / "tensorboard.log"

    def _probe(self) -> None:
        _http.open(f"{self.url}/data/environment", timeout=10).close()


def _without_proxy(host: str) -> dict[str, str]:
    """What ``child_env`` sets already for HOST, for another loopback address."""
    direct = f"{HOST},127.0.0.0/8,{host}"
    return {} if host == HOST else {"no_proxy": direct, "NO_PROXY": direct}
