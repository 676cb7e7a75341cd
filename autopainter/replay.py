"""One step of a run once more, with the terms of each of its samples: which of them made a loss no number.

A step is a function of the configuration, the data set and the weights before it, so it can be done again from any
checkpoint before it, in one process. The run is only read.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from autopainter import arithmetic, checkpoint, diverged, memory, storage
from autopainter.checkpoint import Checkpoint, Tensors
from autopainter.config import Config, restore
from autopainter.data import manifest as manifests
from autopainter.data.manifest import Manifest
from autopainter.data.stream import Batch, TrainingStream
from autopainter.errors import UserError
from autopainter.storage import Store
from autopainter.trainer import SCALARS, Trainer

log = logging.getLogger(__name__)

COLUMNS = ("generator/pixel", "generator/feature", "generator/adversarial", "generator/tv", "discriminator/loss")
"""The terms of a sample, by their names in ``SCALARS``."""


def not_finite(values: Mapping[str, float]) -> list[str]:
    """Names of the values that are no numbers or infinite."""
    return [name for name, value in values.items() if not math.isfinite(value)]


@dataclass(frozen=True)
class Sample:
    """A sample of the global batch, computed alone with the weights before the step.

    Attributes:
        key: its name in the data set.
        terms: the values of ``COLUMNS``.
    """

    key: str
    terms: dict[str, float]


@dataclass(frozen=True)
class Replay:
    """A step that was done again.

    Attributes:
        step: its number, counted from 1.
        start: steps of the checkpoint that it was reached from; 0: from the beginning.
        workers: workers that the run had.
        microbatch: images computed at once.
        scalars: the values of ``SCALARS`` over the global batch.
        recorded: the same as the guard saw them in the run; None if it did not stop the run here.
        samples: one for each sample of the global batch, in its order.
    """

    step: int
    start: int
    workers: int
    microbatch: int
    scalars: dict[str, float]
    recorded: dict[str, float] | None
    samples: list[Sample]


@dataclass(frozen=True)
class _Left:
    """What the guard left of a step that it stopped the run at."""

    config: Config
    manifest_id: str
    workers: int
    values: dict[str, float]


@dataclass(frozen=True)
class _Beginning:
    """What the run says of the way to a step."""

    config: Config
    manifest_id: str
    workers: int
    start: int
    tensors: Tensors | None


def parse(text: str) -> tuple[str, int]:
    """The run and the step of ``RUN@STEP``; ``UserError`` if it is none."""
    run, _, step = text.rpartition("@")
    if not (run and step.isdecimal() and int(step) >= 1):
        raise UserError(f"{text!r}: write it as RUN@STEP, such as s3://autopainter/runs/name@1200; the first step is 1")
    return run, int(step)


def replay(
    run_uri: str, step: int, device: torch.device, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Replay:
    """Do one step of a run again.

    Args:
        run_uri: folder or s3:// URI of the run.
        step: the step, counted from 1 as in TensorBoard and in ``diverged/STEP.json``.
        progress: told what is done, of how much, on the way to the step.

    Raises:
        UserError: there is no such run or step, nothing to begin with, the data set is gone or another one, or the
            GPU's memory is too small.
        StorageError: storage cannot be read.
    """
    run = storage.open_store(run_uri)
    beginning, left = _find(run, step)
    config = _as_in_a_worker(beginning, run, device)
    manifest = _manifest(beginning)
    arithmetic.prepare(config, device)  # as the run did
    trainer = Trainer(config, device)
    if beginning.tensors is not None:
        trainer.load_state(beginning.tensors)
    stream = TrainingStream(manifest, config, 0, 1, beginning.start)
    try:
        _go_to(step, trainer, stream, beginning.start, lambda done: progress("steps", done, step - beginning.start))
        batch = next(stream)
        samples = _each_sample(trainer, batch)  # first: the step changes the weights
        values = trainer.step(step - 1, batch)[: len(SCALARS)].tolist()
    except RuntimeError as error:
        if memory.ran_out(error) != "gpu":
            raise
        raise UserError(f"{error}; --device cpu takes the host's memory instead") from None
    finally:
        stream.close()
    assert config.train.microbatch is not None
    return Replay(
        step, beginning.start, beginning.workers, config.train.microbatch, dict(zip(SCALARS, values, strict=True)),
        left.values if left else None, samples,
    )  # fmt: skip


def _find(run: Store, step: int) -> tuple[_Beginning, _Left | None]:
    committed, attempts = checkpoint.survey(run).committed, checkpoint.read_attempts(run)
    left = _left_by_the_guard(run, step, committed[max(committed)] if committed else None)
    if not (left or committed or attempts):
        raise UserError(f"{run.uri}: there is no run; RUN is STORAGE/NAME, a folder or an s3:// URI")
    # A run may have been continued to a later end than that of the checkpoint that is loaded.
    end = max((saved.meta["config"]["train"]["steps"] for saved in committed.values()), default=step)
    if step > end and not left:
        raise UserError(f"{run.uri}@{step}: there is no such step: train.steps of the run is {end}")
    start, tensors = 0, None
    if found := checkpoint.newest(run, at_most=step - 1):
        saved, tensors = found
        start = saved.step
        # What the guard left is of the very start of the run that did the step: the data set may have moved since.
        config = left.config if left else restore(saved.meta["config"], f"{run.uri}, step {saved.step}")
        manifest_id = saved.meta["manifest_id"]
    elif left or committed:
        # All is a function of configuration and step, so the way from the beginning ends in the same state.
        if left:
            config, manifest_id = left.config, left.manifest_id
        else:
            first = committed[min(committed)]
            config = restore(first.meta["config"], f"{run.uri}, step {first.step}")
            manifest_id = first.meta["manifest_id"]
        if config.train.init_from:
            raise UserError(
                f"{run.uri}@{step}: nothing to begin with: no good checkpoint of step {step - 1} or before (saved"
                f" steps: {sorted(committed)}), and it began with the weights of {config.train.init_from}"
            )
    else:
        raise UserError(
            f"{run.uri}@{step}: nothing to begin with: no checkpoint, and no configuration in"
            f" {run.locate(diverged.key(step))}"
        )
    # Of the starts of the run that came by this step, the last one is what it went on with.
    workers = [attempt.workers for attempt in attempts if attempt.workers and (attempt.step or 0) < step]
    known = workers[-1] if workers else left.workers if left else config.cluster.workers
    return _Beginning(config, manifest_id, known, start, tensors), left


def _left_by_the_guard(run: Store, step: int, saved: Checkpoint | None) -> _Left | None:
    """What the guard left of a step; None if there is nothing, or nothing that tells how the step was done.

    Args:
        saved: any checkpoint of the run. A run that diverged before its first one may be begun again with other
            values, and what was left of the earlier beginning is then of another run.
    """
    key = diverged.key(step)
    try:
        document = json.loads(run.read(key))
        config = restore(document["config"], "its configuration")
        values = {name: float(value) for name, value in document["values"].items()}
        left = _Left(config, document["manifest_id"], int(document["workers"]), values)
        if saved and not (
            saved.meta["manifest_id"] == left.manifest_id
            and restore(saved.meta["config"], run.uri).identity() == config.identity()
        ):
            raise ValueError("of another configuration or data set than the run's checkpoints")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: passed over: %s", run.locate(key), error)
        return None
    return left


def _as_in_a_worker(beginning: _Beginning, run: Store, device: torch.device) -> Config:
    """The configuration with the microbatch that a worker of the run took, memory ladder included."""
    config, workers = beginning.config, beginning.workers
    rung = memory.GpuLadder(run, config, workers, device).rung
    together = workers if config.model.norm == "batch" else 1  # its statistics are those of all workers' microbatches
    knobs = {"microbatch": rung.microbatch * together, "activation_checkpointing": rung.recompute}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=knobs),
            "data": config.data.model_copy(update={"cache": None}),  # a folder of the run's nodes, not of this one
        }
    )


def _manifest(beginning: _Beginning) -> Manifest:
    """The run's data set; ``UserError`` if it is gone or is another one."""
    uri = beginning.config.data.manifest
    manifest = manifests.load(uri)
    manifests.check_trained_on(manifest, uri, beginning.config.run.uri, beginning.manifest_id, "")
    manifests.check_shard(manifest, "train")
    return manifest


def _go_to(step: int, trainer: Trainer, stream: TrainingStream, start: int, progress: Callable[[int], None]) -> None:
    """Do the steps before a step."""
    sound = True
    for before in range(start, step - 1):
        values = dict(zip(SCALARS, trainer.step(before, next(stream)).tolist(), strict=False))
        if sound and (terms := not_finite(values)):
            sound = False
            log.warning("step %d, on the way, was not finite already: %s", before + 1, ", ".join(terms))
        progress(before + 1 - start)


def _each_sample(trainer: Trainer, batch: Batch) -> list[Sample]:
    each = (trainer.terms(batch.part(slice(row, row + 1))) for row in range(len(batch.keys)))
    return [Sample(key, {name: terms[name] for name in COLUMNS}) for key, terms in zip(batch.keys, each, strict=True)]
