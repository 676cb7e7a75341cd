"""Train while everything that can be killed is killed: the run must end as one that nobody touched.

Plays Kubernetes on this machine: a SeaweedFS behind a proxy, a Ray head without cores, two Ray nodes with a worker
each, and a driver that is started again whenever it ends. At random moments one of them suffers a fault, of KINDS, and
the next fault waits until the run has made new steps. At last the same run is trained undisturbed. It holds, or the
exit code is 1 and the folder with all logs stays:

- the run ends, with exit code 0, in the same tensors as the undisturbed one, bit for bit;
- its curves show every step once, with the same values;
- storage holds no object that no commit names, no damaged checkpoint and no open upload;
- every fault showed the effect that it should have, and no process is left.

    python scripts/chaos.py --kills 100
    python scripts/chaos.py --kills 5 --kinds raylet,memory --seed 3 --folder /tmp/chaos
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import secrets
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cartoons import pack_cartoons
from chaos_checks import MARK, check, is_alive, left_over
from chaos_watch import ROOT, Attempt, Driver, Failed, Kill, NoEffect, Watch
from faulty_proxy import FaultyProxy
from processes import ServiceError
from services import RayCluster, RayNode, SeaweedFS
from trial import trial

from autopainter import checkpoint, storage

KINDS = ("rank", "driver", "raylet", "storage", "sigterm", "memory", "truncated", "flipped", "outage")
"""Faults.

rank, driver, raylet: SIGKILL. storage: SIGKILL of the server, which is back after some seconds. sigterm: SIGTERM of
the driver. memory: a node seems to have no memory left, so that Ray's monitor kills a worker. truncated, flipped:
SIGKILL of all workers, and the newest checkpoint is shortened or has a bit changed. outage: 10 s in which storage
answers 503.
"""
OUTAGES = ("storage", "outage")
"""Those that need not interrupt the run."""
DRIVER_KINDS = ("driver", "sigterm")
HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
"""Loopback addresses of the Ray head and of the nodes."""
RUN, REFERENCE = "chaos", "undisturbed"
WORKERS = 2
PICTURES = 90
ENDLESS = 10_000_000
"""train.steps while there are faults to come."""
LAST_STEPS = 20
"""Steps that are trained after the last fault."""
PROGRESS_STEPS = 3
"""Least steps between a resume and the next fault."""
WAIT_SECONDS = 300.0
"""Whatever is waited for has failed if it takes longer."""
OUTAGE_SECONDS = 10.0
USUAL_SHARE, FULL_SHARE = 0.3, 0.99
"""Memory that a node seems to use, of all that there is; Ray's monitor kills from 0.95 on."""
TICK_SECONDS = 0.03
USER_ERROR = 2
"""Exit code of a driver that no other start would help."""


class Chaos:
    """The services of a run, and the faults that they suffer."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.logs, temporary = folder / "logs", folder / "tmp"
        for path in (self.logs, temporary):
            path.mkdir(parents=True, exist_ok=True)
        self._base = {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"}
        self.watch = Watch()
        self.nodes: list[RayNode] = []
        self.meminfo: list[Path | None] = []
        self.kills: list[Kill] = []
        self.ends: list[int] = []  # exit codes of drivers
        self.surprises: list[str] = []
        self._wanted = False  # whether a driver that ended is started again

    @contextlib.contextmanager
    def services(self) -> Iterator[None]:
        """Everything but the driver, up; nothing is left afterwards."""
        with contextlib.ExitStack() as stack:
            self.server = stack.enter_context(SeaweedFS(self.folder / "weed"))
            self.proxy = stack.enter_context(FaultyProxy(self.server.endpoint))
            # This process looks at storage past the proxy.
            os.environ.update(self.server.env)
            self.manifest = pack_cartoons("s3://datasets/chaos", PICTURES)
            env = {**self._base, **self.server.env, "AWS_ENDPOINT_URL": self.proxy.url}
            # A monitor that looks at the machine's memory would meddle when others use it.
            no_monitor, monitor = ({"RAY_memory_monitor_refresh_ms": ms} for ms in ("0", "100"))
            self.head = stack.enter_context(RayCluster(num_cpus=0, env={**env, **no_monitor}, host=HOSTS[0]))
            for number, host in enumerate(HOSTS[1:]):
                self.meminfo.append(self.folder / f"meminfo-{number}" if RayNode.can_mount() else None)
                self._show_memory(number, USUAL_SHARE)
                more = monitor if self.meminfo[number] else no_monitor
                node = RayNode(self.head, host, num_cpus=1, env={**env, **more}, meminfo=self.meminfo[number])
                self.nodes.append(stack.enter_context(node))
            self.driver = Driver(self._settings(RUN, ENDLESS), {**env, **self.head.env}, self.logs)
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

    # -- what Kubernetes does

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

    # -- faults

    def kill(self, kind: str) -> Kill:
        """One fault at a random moment, and what becomes of it."""
        self._wait_for_progress()
        moment = time.monotonic() + self.draw.uniform(0, 1.5)
        self.until(lambda: time.monotonic() > moment, "a moment")
        old, ends = self.current, len(self.ends)
        before, began = old.last, time.monotonic()
        details, mended = getattr(self, f"_{kind}")()
        is_outage = kind in OUTAGES

        def first_step() -> float | None:
            """When the first new step was seen."""
            for attempt in self.watch.attempts[self.watch.attempts.index(old) + (not is_outage) :]:
                least = max(before, 0 if attempt is old else old.last)
                for step, seen in attempt.times.items():
                    if step > least and seen > mended:
                        return seen
            return None

        self.until(lambda: first_step() is not None, f"a new step after {kind}")
        done = first_step()
        assert done is not None
        self._check_effect(kind)
        extra = self.ends[ends + (kind in DRIVER_KINDS) :]
        place = f"kill {len(self.kills) + 1} ({kind})"
        if extra:
            self.surprises.append(f"{place}: the driver ended by itself with code {extra}")
        new = self.current
        firsts = [seen for a in self.watch.attempts if a is not old or is_outage for seen in a.times.values()]
        kill = Kill(
            kind, old.last, new.start if new is not old else old.last,
            lost=max(old.last - new.start, 0) if new is not old else 0,
            seconds=done - began, first_seconds=min(seen for seen in firsts if seen > mended) - began,
            attempts=new.number - old.number, details=details,
        )  # fmt: skip
        self.kills.append(kill)
        return kill

    @property
    def current(self) -> Attempt:
        """The start of the run that was seen last."""
        assert self.watch.current is not None
        return self.watch.current

    def _wait_for_progress(self) -> None:
        """Some steps beyond the resume and a checkpoint of this start, as the one after it may be damaged."""

        def is_enough() -> bool:
            return self.current.last - self.current.start >= PROGRESS_STEPS and self.current.saved > 0

        self.until(is_enough, "progress")
        self.until(lambda: len(checkpoint.steps(self._run())) > 1, "a second checkpoint")

    def _run(self) -> storage.Store:
        return storage.open_store(f"s3://runs/{self.driver.settings['run.name']}")

    def _end_ranks(self, *ranks: int) -> None:
        pids = [self.watch.ranks[rank] for rank in ranks]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.until(lambda: not any(map(is_alive, pids)), "the end of a killed worker", 10)

    def _rank(self) -> tuple[str, float]:
        rank = self.draw.randrange(WORKERS)
        self._end_ranks(rank)
        return f"rank {rank}", time.monotonic()

    def _driver(self) -> tuple[str, float]:
        return self._signal_driver(signal.SIGKILL)

    def _sigterm(self) -> tuple[str, float]:
        return self._signal_driver(signal.SIGTERM)

    def _signal_driver(self, signum: signal.Signals) -> tuple[str, float]:
        ends = len(self.ends)
        os.kill(self.driver.pid, signum)
        self.until(lambda: len(self.ends) > ends, f"the driver's end after {signum.name}")
        return f"exit code {self.ends[ends]}", time.monotonic()

    def _raylet(self) -> tuple[str, float]:
        number = self.draw.randrange(len(self.nodes))
        node = self.nodes[number]
        first = node.pid
        for pid in node.pids("raylet"):
            os.kill(pid, signal.SIGKILL)
        self.until(lambda: node.exit_code is None and node.pid != first, "the node's restart")
        return f"node {number}", time.monotonic()

    def _storage(self) -> tuple[str, float]:
        self.server.kill()
        down = time.monotonic() + self.draw.uniform(1, 5)
        self.until(lambda: time.monotonic() > down, "the server's time down")
        self.server.start()
        return "", time.monotonic()

    def _outage(self) -> tuple[str, float]:
        before = self.proxy.injected["down"]
        self.proxy.down = True
        try:
            up = time.monotonic() + OUTAGE_SECONDS
            self.until(lambda: time.monotonic() > up, "the end of the outage")
        finally:
            self.proxy.down = False
        if self.proxy.injected["down"] == before:
            raise NoEffect("outage: nothing was asked of storage meanwhile")
        return f"{self.proxy.injected['down'] - before} answers", time.monotonic()

    def _truncated(self) -> tuple[str, float]:
        return self._damage(lambda data: data[: self.draw.randrange(len(data))])

    def _flipped(self) -> tuple[str, float]:
        def flip(data: bytes) -> bytes:
            place, bit = self.draw.randrange(len(data)), self.draw.randrange(8)
            return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

        return self._damage(flip)

    def _damage(self, change: Callable[[bytes], bytes]) -> tuple[str, float]:
        """Damage the newest checkpoint when nobody is left who could write a newer one."""
        self._end_ranks(*range(WORKERS))
        run = self._run()
        self._damaged = max(checkpoint.steps(run))
        key = checkpoint.read(run, self._damaged).files["state.safetensors"]["key"]
        run.write(key, change(run.read(key)))
        return f"checkpoint of step {self._damaged}", time.monotonic()

    def _memory(self) -> tuple[str, float]:
        """Let a node look out of memory until Ray's monitor has killed its worker."""
        number, ranks, failures = self.draw.randrange(WORKERS), dict(self.watch.ranks), len(self.watch.failures)
        self._show_memory(number, FULL_SHARE)
        try:
            self.until(lambda: not all(map(is_alive, ranks.values())), "memory: the end of a worker", 30, NoEffect)
        finally:
            self._show_memory(number, USUAL_SHARE)
        self.until(lambda: len(self.watch.failures) > failures, "memory: the driver's word of it")
        self._memory_words = self.watch.failures[failures]
        return f"node {number}", time.monotonic()

    def _show_memory(self, number: int, used: float) -> None:
        """What a node sees of its memory: the share of it that is used."""
        path = self.meminfo[number]
        if path is None:
            return
        text = Path("/proc/meminfo").read_text() if not path.exists() else path.read_text()
        total = re.search(r"MemTotal:\s+(\d+) kB", text)
        assert total is not None
        available = f"MemAvailable: {int(int(total[1]) * (1 - used)):16d} kB"
        # In one write, of the same length, into the same file: that one is mounted, and read several times a second.
        with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
            file.write(re.sub(r"MemAvailable:\s+\d+ kB", available, text).encode())

    def _check_effect(self, kind: str) -> None:
        """Raise ``NoEffect`` if the run has not met the fault."""
        if kind in ("truncated", "flipped") and self._damaged not in self.watch.passed_over:
            raise NoEffect(f"{kind}: the checkpoint of step {self._damaged} was not passed over")
        if kind == "memory" and "memory" not in self._memory_words.lower():
            raise NoEffect(f"memory: the worker group failed of something else: {self._memory_words}")

    # -- the end

    def finish(self) -> int:
        """Let the run end; its number of steps."""
        self._wait_for_progress()
        self._wanted = False
        self._end_driver()
        # Workers outlive a driver that does not stop them, and might train beyond any number that is chosen now.
        self.until(lambda: not any(map(is_alive, self.watch.ranks.values())), "the end of the workers")
        steps = max(self.current.last, *checkpoint.steps(self._run())) + LAST_STEPS
        self._train_to_end(RUN, steps)
        return steps

    def reference(self, steps: int) -> None:
        """Train the same run undisturbed."""
        self.watch = Watch()
        self._train_to_end(REFERENCE, steps)
        if len(self.watch.attempts) != 1:
            raise Failed(f"the reference run was disturbed: it took {len(self.watch.attempts)} starts")

    def _train_to_end(self, name: str, steps: int) -> None:
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


def order_of(kinds: list[str], count: int, draw: random.Random) -> list[str]:
    """So many kinds in random order, each about equally often."""
    shuffled = draw.sample(kinds, len(kinds))
    return draw.sample([shuffled[number % len(kinds)] for number in range(count)], count)


def table(kills: list[Kill]) -> str:
    """What the faults of each kind cost, as a Markdown table."""
    lines = ["| fault | times | steps lost: median, max | seconds to the first new step: median, max |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for kind in (*KINDS, "all"):
        chosen = [kill for kill in kills if kind in (kill.kind, "all")]
        if chosen:
            lost, seconds = [kill.lost for kill in chosen], [kill.seconds for kill in chosen]
            lines.append(
                f"| {kind} | {len(chosen)} | {statistics.median(lost):.0f}, {max(lost)}"
                f" | {statistics.median(seconds):.1f}, {max(seconds):.1f} |"
            )
    return "\n".join(lines)


def run(chaos: Chaos, kinds: list[str], count: int) -> None:
    """The whole test; ``Failed`` if something does not hold."""
    token = os.environ[MARK] = secrets.token_hex(8)  # all our processes inherit it
    order = order_of(kinds, count, chaos.draw)
    without_effect: list[str] = []
    with chaos.services():
        chaos.begin()
        for number, kind in enumerate(order, 1):
            try:
                kill = chaos.kill(kind)
            except NoEffect as error:
                without_effect.append(f"{number}: {error}")
                print(f"{number}/{count} NO EFFECT: {error}", flush=True)
                continue
            print(
                f"{number}/{count} {kind}: at step {kill.step}, {kill.lost} lost, new steps after"
                f" {kill.seconds:.1f} s, {kill.attempts} start(s); {kill.details}", flush=True,
            )  # fmt: skip
        steps = chaos.finish()
        print(f"the run is finished: {steps} steps; now the undisturbed one", flush=True)
        chaos.reference(steps)
        check(f"s3://runs/{RUN}", f"s3://runs/{REFERENCE}", steps, chaos.server, chaos.folder / "curves")
    if left := left_over(token):
        raise Failed(f"processes are left: {left}")
    if without_effect:
        raise Failed(f"{len(without_effect)} faults without effect: {without_effect}")


def report(chaos: Chaos) -> dict[str, Any]:
    """Print what the faults cost; the same for a file."""
    print(table(chaos.kills))
    for surprise in chaos.surprises:
        print(f"note: {surprise}")
    return {
        "kills": [dataclasses.asdict(kill) for kill in chaos.kills],
        "surprises": chaos.surprises,
        "driver_exit_codes": chaos.ends,
        "median_seconds": statistics.median(kill.seconds for kill in chaos.kills) if chaos.kills else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=lambda text: text.split(","), help="only these, of KINDS")
    parser.add_argument("--folder", type=Path, help="where logs and storage go, and stay; none: a temporary folder")
    parser.add_argument("--json", type=Path, help="write what is measured to this file")
    options = parser.parse_args()
    kinds = options.kinds or list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))} not of {', '.join(KINDS)}")
    if "memory" in kinds and not RayNode.can_mount():
        if options.kinds:
            parser.error("--kinds: memory: needs the right to mount, as root has on most machines")
        kinds.remove("memory")
        print("memory: LEFT OUT, it needs the right to mount, as root has on most machines")
    if options.kills < 1:
        parser.error("--kills: at least 1")
    with trial(options.folder, "autopainter-chaos-", (Failed, ServiceError)) as held:
        chaos = Chaos(held.folder, options.seed)
        run(chaos, kinds, options.kills)
    result = {"failed": held.failed, "seed": options.seed, "seconds": held.seconds, **report(chaos)}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    seconds = f"{result['seconds']:.0f} s"
    return held.conclude(f"{len(chaos.kills)} faults in {seconds}, the undisturbed run among them: all holds")


if __name__ == "__main__":
    sys.exit(main())
