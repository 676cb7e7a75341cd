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
import secrets
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos_checks import MARK, check, is_alive, left_over
from chaos_stage import FULL_SHARE, USUAL_SHARE, WORKERS, Stage
from chaos_watch import Failed, Kill, NoEffect, Watch
from processes import ServiceError
from services import RayNode
from trial import trial

from autopainter import checkpoint

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
RUN, REFERENCE = "chaos", "undisturbed"
ENDLESS = 10_000_000
"""train.steps while there are faults to come."""
LAST_STEPS = 20
"""Steps that are trained after the last fault."""
OUTAGE_SECONDS = 10.0


class Faults:
    """What a stage suffers."""

    def __init__(self, stage: Stage, draw: random.Random) -> None:
        self.stage, self.draw = stage, draw
        self.kills: list[Kill] = []

    def kill(self, kind: str) -> Kill:
        """One fault at a random moment, and what becomes of it."""
        self.stage.wait_for_progress()
        moment = time.monotonic() + self.draw.uniform(0, 1.5)
        self.stage.until(lambda: time.monotonic() > moment, "a moment")
        old, ends = self.stage.current, len(self.stage.ends)
        before, began = old.last, time.monotonic()
        details, mended = getattr(self, f"_{kind}")()
        is_outage = kind in OUTAGES

        def first_step() -> float | None:
            """When the first new step was seen."""
            for attempt in self.stage.watch.attempts[self.stage.watch.attempts.index(old) + (not is_outage) :]:
                least = max(before, 0 if attempt is old else old.last)
                for step, seen in attempt.times.items():
                    if step > least and seen > mended:
                        return seen
            return None

        self.stage.until(lambda: first_step() is not None, f"a new step after {kind}")
        done = first_step()
        assert done is not None
        self._check_effect(kind)
        extra = self.stage.ends[ends + (kind in DRIVER_KINDS) :]
        place = f"kill {len(self.kills) + 1} ({kind})"
        if extra:
            self.stage.surprises.append(f"{place}: the driver ended by itself with code {extra}")
        new = self.stage.current
        firsts = [seen for a in self.stage.watch.attempts if a is not old or is_outage for seen in a.times.values()]
        kill = Kill(
            kind, old.last, new.start if new is not old else old.last,
            lost=max(old.last - new.start, 0) if new is not old else 0,
            seconds=done - began, first_seconds=min(seen for seen in firsts if seen > mended) - began,
            attempts=new.number - old.number, details=details,
        )  # fmt: skip
        self.kills.append(kill)
        return kill

    def _end_ranks(self, *ranks: int) -> None:
        pids = [self.stage.watch.ranks[rank] for rank in ranks]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.stage.until(lambda: not any(map(is_alive, pids)), "the end of a killed worker")

    def _rank(self) -> tuple[str, float]:
        rank = self.draw.randrange(WORKERS)
        self._end_ranks(rank)
        return f"rank {rank}", time.monotonic()

    def _driver(self) -> tuple[str, float]:
        return self._signal_driver(signal.SIGKILL)

    def _sigterm(self) -> tuple[str, float]:
        return self._signal_driver(signal.SIGTERM)

    def _signal_driver(self, signum: signal.Signals) -> tuple[str, float]:
        ends = len(self.stage.ends)
        os.kill(self.stage.driver.pid, signum)
        self.stage.until(lambda: len(self.stage.ends) > ends, f"the driver's end after {signum.name}")
        return f"exit code {self.stage.ends[ends]}", time.monotonic()

    def _raylet(self) -> tuple[str, float]:
        number = self.draw.randrange(len(self.stage.nodes))
        node = self.stage.nodes[number]
        first = node.pid
        for pid in node.pids("raylet"):
            os.kill(pid, signal.SIGKILL)
        self.stage.until(lambda: node.exit_code is None and node.pid != first, "the node's restart")
        return f"node {number}", time.monotonic()

    def _storage(self) -> tuple[str, float]:
        self.stage.server.kill()
        down = time.monotonic() + self.draw.uniform(1, 5)
        self.stage.until(lambda: time.monotonic() > down, "the server's time down")
        self.stage.server.start()
        return "", time.monotonic()

    def _outage(self) -> tuple[str, float]:
        before = self.stage.proxy.injected["down"]
        self.stage.proxy.down = True
        try:
            up, injected = time.monotonic() + OUTAGE_SECONDS, self.stage.proxy.injected
            self.stage.until(lambda: time.monotonic() > up and injected["down"] > before, "an outage that is noticed")
        finally:
            self.stage.proxy.down = False
        return f"{self.stage.proxy.injected['down'] - before} answers", time.monotonic()

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
        run = self.stage.run()
        self._damaged = max(checkpoint.steps(run))
        key = checkpoint.read(run, self._damaged).files["state.safetensors"]["key"]
        run.write(key, change(run.read(key)))
        return f"checkpoint of step {self._damaged}", time.monotonic()

    def _memory(self) -> tuple[str, float]:
        """Let a node look out of memory until Ray's monitor has killed its worker."""
        number, stage, pids = self.draw.randrange(WORKERS), self.stage, list(self.stage.watch.ranks.values())
        failures = len(stage.watch.failures)
        stage.show_memory(number, FULL_SHARE)
        try:
            stage.until(lambda: not all(map(is_alive, pids)), "memory: the end of a worker", 30, NoEffect)
        finally:
            stage.show_memory(number, USUAL_SHARE)
        stage.until(lambda: len(stage.watch.failures) > failures, "memory: the driver's word of it")
        self._memory_words = stage.watch.failures[failures]
        return f"node {number}", time.monotonic()

    def _check_effect(self, kind: str) -> None:
        """Raise ``NoEffect`` if the run has not met the fault."""
        if kind in ("truncated", "flipped") and self._damaged not in self.stage.watch.passed_over:
            raise NoEffect(f"{kind}: the checkpoint of step {self._damaged} was not passed over")
        if kind == "memory" and "memory" not in self._memory_words.lower():
            raise NoEffect(f"memory: the worker group failed of something else: {self._memory_words}")


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


def run(faults: Faults, kinds: list[str], count: int) -> None:
    """The whole test; ``Failed`` if something does not hold."""
    stage = faults.stage
    token = os.environ[MARK] = secrets.token_hex(8)  # all our processes inherit it
    without_effect: list[str] = []
    with stage.services(RUN, ENDLESS):
        stage.begin()
        for number, kind in enumerate(order_of(kinds, count, faults.draw), 1):
            try:
                kill = faults.kill(kind)
            except NoEffect as error:
                without_effect.append(f"{number}: {error}")
                print(f"{number}/{count} NO EFFECT: {error}", flush=True)
                continue
            print(
                f"{number}/{count} {kind}: at step {kill.step}, {kill.lost} lost, new steps after"
                f" {kill.seconds:.1f} s, {kill.attempts} start(s); {kill.details}", flush=True,
            )  # fmt: skip
        stage.wait_for_progress()
        steps = stage.end() + LAST_STEPS
        stage.train_to_end(RUN, steps)
        print(f"the run is finished: {steps} steps; now the undisturbed one", flush=True)
        stage.watch = Watch()
        stage.train_to_end(REFERENCE, steps)
        if len(stage.watch.attempts) != 1:
            raise Failed(f"the reference run was disturbed: it took {len(stage.watch.attempts)} starts")
        check(f"s3://runs/{RUN}", f"s3://runs/{REFERENCE}", steps, stage.server, stage.folder / "curves")
    if left := left_over(token):
        raise Failed(f"processes are left: {left}")
    if without_effect:
        raise Failed(f"{len(without_effect)} faults without effect: {without_effect}")


def report(faults: Faults) -> dict[str, Any]:
    """Print what the faults cost; the same for a file."""
    kills, stage = faults.kills, faults.stage
    print(table(kills))
    for surprise in stage.surprises:
        print(f"note: {surprise}")
    return {
        "kills": [dataclasses.asdict(kill) for kill in kills],
        "surprises": stage.surprises,
        "driver_exit_codes": stage.ends,
        "median_seconds": statistics.median(kill.seconds for kill in kills) if kills else None,
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
        faults = Faults(Stage(held.folder), random.Random(options.seed))
        run(faults, kinds, options.kills)
    result = {"failed": held.failed, "seed": options.seed, "seconds": held.seconds, **report(faults)}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    seconds = f"{result['seconds']:.0f} s"
    return held.conclude(f"{len(faults.kills)} faults in {seconds}, the undisturbed run among them: all holds")


if __name__ == "__main__":
    sys.exit(main())
