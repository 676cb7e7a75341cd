"""A run from where it stands to its end: resume, stream, step, show, save, and stop when asked to."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from autopainter import arithmetic, compiling, diverged, journal, memory, parallel, resume, storage
from autopainter.cgroup import Groups
from autopainter.config import Config
from autopainter.data import manifest as manifests
from autopainter.data.chunks import Split
from autopainter.data.stream import TrainingStream
from autopainter.errors import Diverged, UserError
from autopainter.host import Host
from autopainter.models import vgg
from autopainter.parallel import Readback, Request
from autopainter.reporter import Reporter
from autopainter.storage import Store
from autopainter.telemetry.metrics import Metrics
from autopainter.trainer import SCALARS, Trainer

log = logging.getLogger(__name__)

_PROBE = "attempts/preflight"

_TRIM_SECONDS = 10.0

_ENDS: dict[str, tuple[journal.Kind, str]] = {
    "stopped": ("stopped", "it was asked to stop"),
    "leaving": ("preempted", "a machine that runs a worker is taken away"),
}


@dataclass(frozen=True)
class Ended:
    """How a call of ``train`` ended.

    Attributes:
        start: steps that had been done before it.
        done: steps that are done now.
        why: the run is finished; the host asked for the end; or it takes a machine of the group away.
    """

    start: int
    done: int
    why: Literal["finished", "stopped", "leaving"]


def preflight(config: Config, world: int, origin: str, wanted: resume.Resume = "auto", overwrite: bool = False) -> None:
    """Check everything that can be checked before any process or GPU is taken, and make way for a new run if asked to.

    Args:
        world: number of workers; ``origin`` is the name of what says so.
        wanted, overwrite: as ``resume.claim`` takes them.

    Raises:
        UserError: what is wrong, with the field to change.
        StorageError: storage cannot be reached.
    """
    config.check_world(world, origin)
    manifest = manifests.load(config.data.manifest)
    for name in manifests.SPLITS:
        Split(manifest, name, config)  # raises if it has no drawings and stored ones are wanted
        manifests.check_shard(manifest, name)
    if config.loss.feature_weight > 0:
        assert config.loss.vgg_weights is not None
        vgg.load(config.loss.vgg_weights, config.loss.feature_layer, config.loss.vgg_sha256)
    if config.train.compile:
        compiling.check()
    resume.claim(config, wanted, overwrite)
    run = storage.open_store(config.run.uri)
    resume.check(config, manifest, run)
    run.write(_PROBE, b"")  # a place that cannot be written is found now, not at the first checkpoint
    run.delete([_PROBE])


def train(config: Config, device: torch.device, host: Host | None = None) -> Ended:
    """Train until ``train.steps`` steps are done or the host wants it to end, continuing the run where it was left.

    Called by every worker, inside a torch.distributed group if there are several.

    Raises:
        UserError: the run cannot be continued with this configuration.
        Diverged: a loss is no longer a number.
        Superseded: another start of the run has taken over.
        CheckpointTooOld: no checkpoint could be saved for too long.
    """
    config.check_world(parallel.world(), "the number of workers")
    if config.model.norm == "batch" and parallel.world() > 1 and device.type == "cpu":
        raise UserError("model.norm: batch is synchronised over workers on GPUs only; use instance or group")
    arithmetic.prepare(config, device)
    run = storage.open_store(config.run.uri)
    try:
        ended = _Run(config, device, run, host or Host()).train()
    except (MemoryError, RuntimeError) as error:
        if memory.ran_out(error) == "host":
            memory.note_host(run, config, parallel.world(), str(error))
        raise
    except (UserError, Diverged):
        memory.forget_kernel_kills(run)
        raise
    memory.forget_kernel_kills(run)
    return ended


class _Run:
    """One worker's part of one start of a run."""

    def __init__(self, config: Config, device: torch.device, run: Store, host: Host) -> None:
        world = parallel.world()
        memory.note_kernel_kills(run, config, world, Groups())
        self.config = memory.within_host(run, config, world)
        self.device, self.run, self.host = device, run, host
        self.manifest = manifests.load(config.data.manifest)
        self.ladder = memory.GpuLadder(run, config, world, device)
        self.trainer = Trainer(self.config, device, self.ladder)
        self.reporter: Reporter | None = None
        self._next_meeting = self._next_trim = 0.0
        self._told_depth = self.ladder.depth

    def train(self) -> Ended:
        """Do the steps that are missing."""
        found = resume.load(self.trainer, self.manifest, self.run)
        start, end = found or 0, self.config.train.steps
        if start >= end:
            log.info("run %s is finished: %d steps done", self.config.run.name, start)
            return Ended(start, start, "finished")
        begun = parallel.largest(int(time.time()), self.device)
        self.metrics = Metrics(self.config, self.device, begun, start)
        try:
            ended = self._from(start, end, found is None)
            if ended.why != "leaving":
                self.metrics.ended()
            return ended
        except Diverged:
            self.metrics.not_finite()
            raise
        finally:
            self.metrics.close()

    def _from(self, start: int, end: int, new: bool) -> Ended:
        """Do the steps from ``start`` on; ``new``: there is no checkpoint yet."""
        if parallel.rank() == 0:
            self.reporter = Reporter(self.trainer, self.manifest, self.run, start, self.host, self.metrics)
            if new and self.config.train.init_from:
                self.reporter.save_first()  # from now on the run does not need the other one any more
        stream = TrainingStream(
            self.manifest, self.config, parallel.rank(), parallel.world(), start, pinned=self.device.type == "cuda"
        )
        if self.reporter:
            log.info("the stream of a worker holds at most %.0f MiB", stream.most_bytes / 2**20)
        try:
            return self._steps(stream, start, end)
        finally:
            self.metrics.streamed(stream)
            stream.close()
            if self.reporter:
                self.reporter.close()

    def _steps(self, stream: TrainingStream, start: int, end: int) -> Ended:
        readback = Readback(self.device)
        for step in range(start, end):
            values = self.trainer.step(step, next(stream), self._requests())
            why = None
            for done, arrived in readback.put(step + 1, values):
                self._check_finite(done, arrived[: len(SCALARS)])
                why = why or self._answer(arrived[len(SCALARS) :])
            if self.reporter:
                self.reporter.step_done(step + 1, values[: len(SCALARS)], stream)
            self.metrics.step_done(step + 1, stream)
            if time.monotonic() >= self._next_trim:
                memory.trim()
                self._next_trim = time.monotonic() + _TRIM_SECONDS
            if why and step + 1 < end:
                if self.reporter:
                    self.reporter.save_last(step + 1, values[: len(SCALARS)])
                    journal.write(self.run, *_ENDS[why], step + 1)
                return Ended(start, step + 1, why)
        if self.reporter:
            self.reporter.finish()
        return Ended(start, end, "finished")

    def _requests(self) -> list[float]:
        """What this worker asks of all workers in the next step."""
        asked = [0.0] * len(Request)
        asked[Request.STOP] = self.host.stop_requested()
        asked[Request.MEMORY] = self.ladder.depth > self._told_depth
        if self.reporter:
            asked[Request.SAVED] = self.reporter.has_news()
            if time.monotonic() >= self._next_meeting:
                asked[Request.MEET] = self.host.meeting_seconds < math.inf
                self._next_meeting = time.monotonic() + self.host.meeting_seconds
        return asked

    def _answer(self, asked: Sequence[float]) -> Literal["stopped", "leaving"] | None:
        """Do what some worker asked for: the same in all workers, after the same step."""
        if asked[Request.MEMORY]:
            before = self._told_depth
            self.ladder.depth = self._told_depth = parallel.largest(self.ladder.depth, self.device)
            self.metrics.stepped_down(self.ladder.depth - before)
        if asked[Request.SAVED]:
            self.host.saved(*(self.reporter.news() if self.reporter else (0, "", {})))
        if asked[Request.MEET] and self.host.leaving():
            return "leaving"
        return "stopped" if asked[Request.STOP] else None

    def _check_finite(self, done: int, values: Sequence[float]) -> None:
        try:
            diverged.check(values, done, self.run, self.manifest, self.config)
        except Diverged:
            if self.reporter:
                self.reporter.checkpoints.wait()
            # The first worker that fails ends the group: worker 0 shall have named the samples and saved what is good.
            parallel.barrier()
            raise
