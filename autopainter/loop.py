"""A run from where it stands to its end: resume, stream, step, show, save."""

import logging
import math
import os
import time
from typing import Any

import torch
import torch.distributed as dist

from autopainter import checkpoint, parallel, storage
from autopainter.checkpoint import CheckpointWriter, Retention
from autopainter.config import Config
from autopainter.data import manifest as manifests
from autopainter.data.chunks import Split
from autopainter.data.manifest import Manifest
from autopainter.data.stream import TrainingStream, validation_batches
from autopainter.errors import CorruptData, Diverged, UserError
from autopainter.evaluate import Score, paint_both
from autopainter.models import vgg
from autopainter.sheet import contact_sheet
from autopainter.storage import Store
from autopainter.telemetry.events import EventWriter
from autopainter.telemetry.metrics import Metrics
from autopainter.trainer import SCALARS, Trainer

log = logging.getLogger(__name__)

_PROBE = "attempts/preflight"


def preflight(config: Config, world: int, origin: str) -> None:
    """Check everything that can be checked before any process or GPU is taken.

    Raises:
        UserError: what is wrong, with the field to change.
        StorageError: storage cannot be reached.
    """
    config.check_world(world, origin)
    manifest = manifests.load(config.data.manifest)
    store = storage.open_store(manifest.uri)
    for name in ("train", "validation"):
        shard = manifest.split(name)[0]
        Split(manifest, name, config)  # raises if it has no drawings and stored ones are wanted
        if store.size(shard.key) != shard.bytes:
            raise UserError(f"data.manifest: {store.locate(shard.key)} is not the shard that the manifest describes")
    if config.loss.feature_weight > 0:
        assert config.loss.vgg_weights is not None
        vgg.load(config.loss.vgg_weights, config.loss.feature_layer, config.loss.vgg_sha256)
    run = storage.open_store(config.run.uri)
    for step in reversed(checkpoint.steps(run)):
        try:
            _check_continues(config, manifest, run, checkpoint.read(run, step).meta)
            break
        except CorruptData:
            continue  # resuming names it and passes it over
    run.write(_PROBE, b"")  # a place that cannot be written is found now, not at the first checkpoint
    run.delete([_PROBE])


def train(config: Config, device: torch.device) -> int:
    """Train until ``train.steps`` steps are done, continuing the run where it was left.

    Called by every worker, inside a torch.distributed group if there are several.

    Returns:
        Steps done before this call: equal to ``train.steps`` or more if the run was finished already.
    """
    config.check_world(parallel.world(), "the number of workers")
    if config.model.norm == "batch" and parallel.world() > 1 and device.type == "cpu":
        raise UserError("model.norm: batch is synchronised over workers on GPUs only; use instance or group")
    if device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun and by Ray Train
        torch.set_num_threads(config.train.threads or max((os.cpu_count() or 1) // here, 1))
    else:
        torch.cuda.set_device(device)
        # One kind of GPU, one choice of kernels: what a resumed run computes is what the first one computed.
        torch.backends.cudnn.deterministic = True
    manifest = manifests.load(config.data.manifest)
    run = storage.open_store(config.run.uri)
    trainer = Trainer(config, device)
    start = _resume(trainer, manifest, run)
    if start >= config.train.steps:
        log.info("run %s is finished: %d steps done", config.run.name, start)
        return start
    reporter = _Reporter(trainer, manifest, run, start) if parallel.rank() == 0 else None
    stream = TrainingStream(manifest, config, parallel.rank(), parallel.world(), start)
    if reporter:
        log.info("the stream of a worker holds at most %.0f MiB", stream.most_bytes / 2**20)
    try:
        for step in range(start, config.train.steps):
            scalars = trainer.step(step, next(stream))
            if reporter:
                reporter.step_done(step + 1, scalars, stream)
        if reporter:
            reporter.finish()
    finally:
        stream.close()
        if reporter:
            reporter.close()
    return start


def _check_continues(config: Config, manifest: Manifest, run: Store, meta: dict[str, Any]) -> None:
    """Refuse to continue a run with another data set or with a field changed that decides what it computes."""
    if meta["manifest_id"] != manifest.id:
        raise UserError(
            f"data.manifest: {config.data.manifest} is another data set (sha256 {manifest.id[:12]}) than the run"
            f" {run.uri} was trained on ({meta['manifest_id'][:12]}); choose another run.name"
        )
    old, new = meta["identity"], config.identity()
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UserError(
                f"{name}: the run {run.uri} was begun with {old.get(name)!r}, now it is {new.get(name)!r};"
                " set it back or choose another run.name"
            )


def _resume(trainer: Trainer, manifest: Manifest, run: Store) -> int:
    """Load the newest good checkpoint into every worker; the steps it stands for, 0 for a new run."""
    start = 0
    if parallel.rank() == 0 and (found := checkpoint.newest(run)):
        saved, tensors = found
        _check_continues(trainer.config, manifest, run, saved.meta)
        trainer.load_state(tensors, saved.step)
        start = saved.step
        log.info("continuing run %s from its checkpoint of step %d", run.uri, start)
    if parallel.world() > 1:
        steps = torch.tensor(start, device=trainer.device)
        dist.broadcast(steps, src=0)
        start = int(steps)
        parallel.broadcast(trainer.state().values())
        trainer.load_state(trainer.state(), start)
    return start


class _Reporter:
    """What worker 0 does beside training: events, metrics, progress lines and checkpoints."""

    def __init__(self, trainer: Trainer, manifest: Manifest, run: Store, start: int) -> None:
        self.trainer, self.config = trainer, trainer.config
        attempt = checkpoint.begin_attempt(run, {"step": start, "workers": parallel.world()})
        meta = {
            "manifest_id": manifest.id,
            "identity": self.config.identity(),
            "config": self.config.model_dump(mode="json"),
        }
        telemetry = self.config.telemetry
        self.metrics = Metrics(self.config.run.name, telemetry.prometheus_port, telemetry.prometheus_host)
        self.checkpoints = CheckpointWriter(
            run, attempt, Retention(self.config.checkpoint.keep), meta, self.metrics.checkpointed
        )
        self.events = EventWriter(run, attempt, start, self.config.telemetry.upload_seconds)
        self.validation = next(validation_batches(manifest, self.config, self.config.telemetry.images))
        self.last_saved = self.last_logged = time.monotonic()
        self.logged_step, self.logged_wait = start, 0.0
        log.info(
            "run %s, attempt %d: steps %d to %d on %d worker(s), %s", self.config.run.name, attempt, start,
            self.config.train.steps, parallel.world(), trainer.device,
        )  # fmt: skip

    def step_done(self, done: int, scalars: torch.Tensor, stream: TrainingStream) -> None:
        """Called after each step; ``done`` counts the steps done."""
        last = done == self.config.train.steps
        if done % self.config.telemetry.log_every_steps == 0 or last:
            self._log(done, dict(zip(SCALARS, scalars.tolist(), strict=True)), stream)
        if done % self.config.telemetry.image_every_steps == 0 or last:
            self._validate(done)
        if time.monotonic() - self.last_saved >= self.config.checkpoint.every_seconds or last:
            self._save(done, scalars)

    def finish(self) -> None:
        """Make sure that the last state is saved."""
        self.checkpoints.wait()
        if self.checkpoints.error:
            raise self.checkpoints.error

    def close(self) -> None:
        self.checkpoints.wait()
        self.events.close()
        self.metrics.close()

    def _log(self, done: int, values: dict[str, float], stream: TrainingStream) -> None:
        now = time.monotonic()
        steps, seconds = done - self.logged_step, now - self.last_logged
        images = steps * self.config.train.global_batch
        wait = stream.wait_seconds - self.logged_wait
        self.events.scalars(values | {"progress/images": done * self.config.train.global_batch}, done)
        self.metrics.logged(done, values, images / seconds)
        self.metrics.images.inc(images)
        self.metrics.streamed(stream)
        left = (self.config.train.steps - done) * seconds / steps
        log.info(
            "step %d/%d  %.1f images/s  waited %.0f%%  G %.3f  L1 %.4f  D %.3f  %d:%02d left", done,
            self.config.train.steps, images / seconds, 100 * wait / seconds, values["generator/loss"],
            values["generator/pixel"], values["discriminator/loss"], left // 60, left % 60,
        )  # fmt: skip
        self.last_logged, self.logged_step, self.logged_wait = now, done, stream.wait_seconds

    def _validate(self, done: int) -> None:
        plain, hinted = paint_both(self.trainer.paint, self.validation)
        for name, painted in (("validation/psnr", plain), ("validation/psnr_with_hints", hinted)):
            self.events.scalars({name: Score().add(painted, self.validation.color).psnr}, done)
        self.events.picture("validation", contact_sheet([(self.validation, plain, hinted)]), done)

    def _save(self, done: int, scalars: torch.Tensor) -> None:
        if not math.isfinite(float(scalars.sum())):
            terms = [name for name, value in zip(SCALARS, scalars.tolist(), strict=True) if not math.isfinite(value)]
            raise Diverged(f"step {done}: {', '.join(terms)} not finite; the last checkpoint is kept")
        # The events go first, so that the curve of a run resumed here has no gap.
        self.checkpoints.save(done, self.trainer.state(), before_commit=self.events.upload)
        self.last_saved = time.monotonic()
