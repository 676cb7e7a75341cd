"""Kubernetes, played on this machine for ``chaos.py``: storage, a Ray cluster, and a driver that is started again."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cartoons import pack_cartoons
from chaos_checks import is_alive
from chaos_watch import ROOT, Attempt, Driver, Failed, Watch
from faulty_proxy import FaultyProxy
from services import RayCluster, RayNode, SeaweedFS, show_memory

from autopainter import checkpoint, storage

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
"""Loopback addresses of the Ray head and of the nodes."""
WORKERS = 2
PICTURES = 90
PROGRESS_STEPS = 3
"""Least steps between a resume and the next fault."""
WAIT_SECONDS = 300.0
"""Whatever is waited for has failed if it takes longer."""
USUAL_SHARE, FULL_SHARE = 0.3, 0.99
"""Memory that a node seems to use, of all that there is; Ray's monitor kills from 0.95 on."""
TICK_SECONDS = 0.03
USER_ERROR = 2
"""Exit code of a driver that no other start would help."""


class Stage:
    """A SeaweedFS behind a proxy, a Ray head without cores, two Ray nodes with a worker each, and a driver.

    Attributes:
        watch: what the driver has said since it was set.
        ends: exit codes of drivers that ended by themselves or by a fault.
        surprises: what a reader of the report should know.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.logs, temporary = folder, folder / "logs", folder / "tmp"
        for path in (self.logs, temporary):
            path.mkdir(parents=True, exist_ok=True)
        self._base = {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"}
        self.watch = Watch()
        self.nodes: list[RayNode] = []
        self._meminfo: list[Path | None] = []
        self.ends: list[int] = []
        self.surprises: list[str] = []
        self._wanted = False  # whether a driver that ended is started again

    @contextlib.contextmanager
    def services(self, name: str, steps: int) -> Iterator[None]:
        """Everything up but the driver, which is to train ``name`` to ``steps``; nothing is left afterwards."""
        with contextlib.ExitStack() as stack:
            self.server = stack.enter_context(SeaweedFS(self.folder / "weed"))
            self.proxy = stack.enter_context(FaultyProxy(self.server.endpoint))
            # This process looks at storage past the proxy.
            os.environ.update(self.server.env)
            self.manifest = pack_cartoons("s3://datasets/chaos", PICTURES)
            env = {**self._base, **self.server.env, "AWS_ENDPOINT_URL": self.proxy.url}
            # A monitor that looks at the machine's memory would meddle when others use it.
            no_monitor, monitor = ({"RAY_memory_monitor_refresh_ms": ms} for ms in ("0", "100"))
            head = RayCluster(num_cpus=0, dashboard=False, env={**env, **no_monitor}, host=HOSTS[0])
            self.head = stack.enter_context(head)
            for number, host in enumerate(HOSTS[1:]):
                self._meminfo.append(self.folder / f"meminfo-{number}" if RayNode.can_mount() else None)
                self.show_memory(number, USUAL_SHARE)
                more = monitor if self._meminfo[number] else no_monitor
                node = RayNode(self.head, host, num_cpus=1, env={**env, **more}, meminfo=self._meminfo[number])
                self.nodes.append(stack.enter_context(node))
            self.driver = Driver(self._settings(name, steps), {**env, **self.head.env}, self.logs)
            stack.callback(self._keep_ray_logs)
            stack.callback(lambda: self.driver.stop())
            yield

    def _keep_ray_logs(self) -> None:
        """Copy Ray's own logs into the folder; its own folder goes with it."""
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(self.head.temp_dir / "session_latest/logs", self.logs / "ray", dirs_exist_ok=True)

    def _settings(self, name: str, steps: int) -> dict[str, Any]:
        return {
            "run.name": name, "run.storage": "s3://runs", "data.manifest": self.manifest, "data.image_size": 32,
            "data.prefetch_batches": 2, "data.fetch_ahead_batches": 2, "model.generator_width": 8,
            "model.discriminator_width": 8, "loss.feature_weight": 0, "train.steps": steps, "train.global_batch": 8,
            "train.precision": "float32", "train.threads": 1, "checkpoint.every_seconds": 1,
            "telemetry.log_every_steps": 1, "telemetry.image_every_steps": 200, "telemetry.images": 2,
            "cluster.workers": WORKERS,
        }  # fmt: skip

    def poll(self) -> None:
        """Read the driver's output, and start again whatever has ended."""
        for line in self.driver.lines():
            self.watch.feed(line)
        code = self.driver.exit_code
        if code is not None and self._wanted:
            self._end_driver()
            self.ends.append(code)
            if code == USER_ERROR:
                raise Failed(f"the driver found an error that only people can mend:\n{self._tail()}")
            if code != 0:
                self.driver.start()
            self._wanted = code != 0
        for node in self.nodes:
            if node.exit_code is not None:
                node.kill()
                node.start()

    def _end_driver(self) -> None:
        self.driver.stop()  # also what a dead one may have left
        for line in self.driver.lines():
            self.watch.feed(line)

    def until(
        self, condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS, error: type[Failed] = Failed
    ) -> None:
        """Wait for a condition; ``error`` if it takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise error(f"{what}: not within {seconds:.0f} s; the end of {self.driver.log}:\n{self._tail()}")
            self.poll()
            time.sleep(TICK_SECONDS)

    def _tail(self) -> str:
        return "\n".join(self.driver.log.read_text(errors="replace").splitlines()[-15:])

    def begin(self) -> None:
        """Start the run."""
        self._wanted = True
        self.driver.start()
        self.until(lambda: self.watch.current is not None, "the first start of the run")

    @property
    def current(self) -> Attempt:
        """The start of the run that was seen last."""
        assert self.watch.current is not None
        return self.watch.current

    def wait_for_progress(self) -> None:
        """Some steps beyond the resume and a checkpoint of this start, as the one after it may be damaged."""

        def is_enough() -> bool:
            return self.current.last - self.current.start >= PROGRESS_STEPS and self.current.saved > 0

        self.until(is_enough, "progress")
        self.until(lambda: len(checkpoint.steps(self.run())) > 1, "a second checkpoint")

    def run(self) -> storage.Store:
        """The folder of the run that is trained, past the proxy."""
        return storage.open_store(f"s3://runs/{self.driver.settings['run.name']}")

    def show_memory(self, number: int, used: float) -> None:
        """What a node sees of its memory: the share of it that is used."""
        if path := self._meminfo[number]:
            show_memory(path, used)

    def end(self) -> int:
        """End driver and workers; the last step that is done or saved."""
        self._wanted = False
        self._end_driver()
        # Workers outlive a driver that does not stop them, and might train beyond any number that is chosen now.
        self.until(lambda: not any(map(is_alive, self.watch.ranks.values())), "the end of the workers")
        return max(self.current.last, *checkpoint.steps(self.run()))

    def train_to_end(self, name: str, steps: int) -> None:
        """Let a driver train a run until it is finished."""
        self.driver.settings = self._settings(name, steps)
        ends = len(self.ends)
        self._wanted = True
        self.driver.start()

        def is_over() -> bool:
            return not self._wanted

        while not is_over():
            before = self.watch.current.last if self.watch.current else 0
            self.until(lambda before=before: is_over() or (  # type: ignore[misc]
                self.watch.current is not None and self.watch.current.last > before), f"the end of {name}")  # fmt: skip
        if bad := [code for code in self.ends[ends:] if code]:
            self.surprises.append(f"the last driver of {name} ended with {bad} before it ended with 0")
