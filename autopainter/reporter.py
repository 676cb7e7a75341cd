"""What worker 0 does beside training: events, metrics, progress lines and checkpoints."""

import logging
import math
import time

import torch

from autopainter import checkpoint, diverged, journal, parallel, schedule
from autopainter.checkpoint import Checkpoint, CheckpointWriter, Retention
from autopainter.data.manifest import Manifest
from autopainter.data.stream import TrainingStream, validation_batches
from autopainter.errors import CheckpointTooOld, Superseded
from autopainter.evaluate import Score, paint_both
from autopainter.host import Host
from autopainter.progress import TrainingProgress
from autopainter.sheet import contact_sheet
from autopainter.storage import Store
from autopainter.telemetry.events import EventWriter
from autopainter.telemetry.metrics import Metrics
from autopainter.trainer import SCALARS, Trainer

log = logging.getLogger(__name__)

_NEWS_SECONDS = 10.0  # the host hears of checkpoints no more often: it costs all workers a meeting


class Reporter:
    """Everything that is done once for all workers, for one start of the run, whose attempt number it takes.

    Args:
        start: steps that were done before this start.
        host: hears of progress and of checkpoints.
        metrics: those of this worker, which keep the run's own too.
    """

    def __init__(
        self, trainer: Trainer, manifest: Manifest, run: Store, start: int, host: Host, metrics: Metrics
    ) -> None:
        self.trainer, self.config, self.host, self.metrics = trainer, trainer.config, host, metrics
        self.manifest, self.run = manifest, run
        attempt = checkpoint.begin_attempt(run, {"step": start, "workers": parallel.world()})
        meta = {"manifest_id": manifest.id, "config": self.config.model_dump(mode="json")}
        telemetry, saving = self.config.telemetry, self.config.checkpoint
        rung = trainer.ladder.depth if trainer.ladder else 0
        self.metrics.started(attempt, journal.counts(run), rung)
        retention = Retention(saving.keep, saving.keep_best)
        self.checkpoints = CheckpointWriter(run, attempt, retention, meta, self.metrics.checkpointed)
        committed = checkpoint.survey(run).committed
        scores = [committed[step].score for step in checkpoint.by_score(committed)[:1]]
        self.best = next((score for score in scores if score is not None), -math.inf)
        self.events = EventWriter(run, attempt, start, telemetry.upload_seconds)
        self.events.configuration(self.config, start)
        self.validation = next(validation_batches(manifest, self.config, telemetry.images))
        self.last_saved = self.last_logged = time.monotonic()
        self.saved_step = self.logged_step = start
        self.logged_wait = 0.0
        self.last_values: dict[str, float] = {}
        self.told: Checkpoint | None = None
        self.last_told = -math.inf
        log.info(
            "run %s, attempt %d: steps %d to %d on %d worker(s), %s", self.config.run.name, attempt, start,
            self.config.train.steps, parallel.world(), trainer.device,
        )  # fmt: skip

    def step_done(self, done: int, scalars: torch.Tensor, stream: TrainingStream) -> None:
        """Called after each step; ``done`` counts the steps done.

        Raises:
            Diverged, Superseded, CheckpointTooOld: the run must not go on.
        """
        last = done == self.config.train.steps
        score = None
        if done % self.config.telemetry.log_every_steps == 0 or last:
            self._log(done, dict(zip(SCALARS, scalars.tolist(), strict=True)), stream)
        if done % self.config.telemetry.image_every_steps == 0 or last:
            score = self._validate(done)
        self._check_checkpoints()
        if last or self._due() or (score is not None and score > self.best):
            self._save(done, scalars, score)

    def save_first(self) -> None:
        """Save the state that the run begins with."""
        self.checkpoints.save(0, self.trainer.state())
        self.finish()

    def save_last(self, done: int, scalars: torch.Tensor) -> None:
        """Save before an early end, and wait until it is done."""
        if self.saved_step != done:
            self._save(done, scalars, None)
        self.finish()

    def finish(self) -> None:
        """Make sure that the last state is saved."""
        self.checkpoints.wait()
        if self.checkpoints.error:
            raise self.checkpoints.error

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and end the events."""
        self.checkpoints.wait()
        self.events.close()

    def has_news(self) -> bool:
        """Whether there is a checkpoint that the host shall hear of."""
        return self.checkpoints.saved is not self.told and time.monotonic() - self.last_told >= _NEWS_SECONDS

    def news(self) -> tuple[int, str, dict[str, float]]:
        """Step and place of the newest checkpoint, and the values that were logged last."""
        self.told, self.last_told = self.checkpoints.saved, time.monotonic()
        assert self.told is not None
        return self.told.step, self.run.locate(f"checkpoints/{self.told.step:08d}.json"), self.last_values

    def _due(self) -> bool:
        """Whether it is time for a checkpoint. While one is still being written, training goes on."""
        every = self.config.checkpoint.every_seconds
        return every == 0 or (time.monotonic() - self.last_saved >= every and not self.checkpoints.busy)

    def _check_checkpoints(self) -> None:
        error = self.checkpoints.error
        if isinstance(error, Superseded):
            raise error
        age = time.monotonic() - self.checkpoints.saved_at
        if error and age > self.config.checkpoint.max_age_seconds:
            raise CheckpointTooOld(
                f"no checkpoint could be saved for {age:.0f} s (checkpoint.max_age_seconds:"
                f" {self.config.checkpoint.max_age_seconds:g}): {error}"
            )

    def _log(self, done: int, values: dict[str, float], stream: TrainingStream) -> None:
        now = time.monotonic()
        steps, seconds = done - self.logged_step, now - self.last_logged
        images = steps * self.config.train.global_batch
        wait = stream.wait_seconds - self.logged_wait
        self.last_values = values
        self.events.scalars(values | {"progress/images": done * self.config.train.global_batch}, done)
        rates = dict.fromkeys(self.trainer.optimizers, schedule.learning_rate(self.config, done - 1))
        self.metrics.logged(values, images / seconds, rates)
        self.host.show(
            TrainingProgress(
                attempt=self.checkpoints.attempt,
                step=done,
                steps=self.config.train.steps,
                images_per_second=images / seconds,
                data_wait=wait / seconds,
                generator_loss=values["generator/loss"],
                pixel_loss=values["generator/pixel"],
                discriminator_loss=values["discriminator/loss"],
                checkpoint_age=now - self.checkpoints.saved_at,
                seconds_left=(self.config.train.steps - done) * seconds / steps,
            )
        )
        self.last_logged, self.logged_step, self.logged_wait = now, done, stream.wait_seconds

    def _validate(self, done: int) -> float:
        """Paint the validation samples and show them; their PSNR with hints."""
        plain, hinted = paint_both(self.trainer.paint, self.validation)
        scores = [Score().add(painted, self.validation.color).psnr for painted in (plain, hinted)]
        self.events.scalars(dict(zip(("validation/psnr", "validation/psnr_with_hints"), scores, strict=True)), done)
        self.events.picture("validation", contact_sheet([(self.validation, plain, hinted)]), done)
        return scores[1]

    def _save(self, done: int, scalars: torch.Tensor, score: float | None) -> None:
        diverged.check(scalars.tolist(), done, self.run, self.manifest, self.config)
        # The events go first, so that the curve of a run resumed here has no gap.
        began = time.monotonic()
        self.checkpoints.save(done, self.trainer.state(), score, before_commit=self.events.upload)
        self.metrics.stalled(time.monotonic() - began)
        self.best = max(self.best, -math.inf if score is None else score)
        self.last_saved, self.saved_step = time.monotonic(), done
