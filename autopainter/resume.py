"""Where a run begins: with its own newest checkpoint, with another run's weights, or with nothing."""

import logging
import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist

from autopainter import checkpoint, parallel, storage
from autopainter.config import Config, restore
from autopainter.data import manifest as manifests
from autopainter.data.manifest import Manifest
from autopainter.errors import CorruptData, Unreadable, UserError
from autopainter.storage import Store
from autopainter.trainer import Trainer

log = logging.getLogger(__name__)

Resume = Literal["auto", "none"]

_KINDS = ("attempts/", "checkpoints/", "diverged/", "events/", "journal/", "memory/")


def claim(config: Config, resume: Resume, overwrite: bool) -> None:
    """Make sure that a run may begin as it was asked to; deletes the run's own objects if it is to be overwritten.

    Raises:
        UserError: ``resume`` is ``none``, and there is something of that name.
    """
    if overwrite and resume != "none":
        raise UserError("--overwrite: only with --resume none: it deletes the run and begins it again")
    if resume == "auto":
        return
    run = storage.open_store(config.run.uri)
    if not (there := [entry.key for kind in _KINDS for entry in run.list(kind)]):
        return
    if not overwrite:
        saved = max(checkpoint.steps(run), default=0)
        raise UserError(
            f"--resume none: the run {run.uri} exists, its newest checkpoint is of step {saved};"
            " choose another run.name, or add --overwrite to delete it"
        )
    # A later attempt, whose record stays, keeps one that may still be alive from writing. Then the commits: without
    # them no checkpoint exists, wherever this is interrupted.
    checkpoint.begin_attempt(run, {"overwrites": True})
    run.delete(key for key in there if re.fullmatch(r"checkpoints/\d+\.json", key))
    run.delete(key for key in there)
    run.abort_uploads("", lambda key: True)
    log.info("deleted the run %s: %d objects", run.uri, len(there))


def check(config: Config, manifest: Manifest, run: Store) -> None:
    """Check that the run, if it has begun, can be continued with this configuration.

    Raises:
        UserError: it cannot; or the weights that it shall begin with cannot be had.
    """
    for step in reversed(checkpoint.steps(run)):
        try:
            check_continues(config, manifest, run, checkpoint.read(run, step).meta)
            return
        except CorruptData:
            continue  # resuming names it and passes it over
    if config.train.init_from:
        other, saved = _source(config.train.init_from)
        _check_fits(config, other, saved)


def check_continues(config: Config, manifest: Manifest, run: Store, meta: dict[str, Any]) -> None:
    """Refuse to continue a run with another data set or with a field changed that decides what it computes."""
    manifests.check_trained_on(
        manifest, config.data.manifest, run.uri, meta["manifest_id"], "; choose another run.name"
    )
    old, new = restore(meta["config"], f"{run.uri}, its configuration").identity(), config.identity()
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UserError(
                f"{name}: the run {run.uri} was begun with {old.get(name)!r}, now it is {new.get(name)!r};"
                " set it back or choose another run.name"
            )


def load(trainer: Trainer, manifest: Manifest, run: Store) -> int | None:
    """Load the state that the run continues from into every worker.

    Returns:
        The steps it stands for; None for a new run, whose first checkpoint is still to be written.
    """
    start: int | None = None
    if parallel.rank() == 0:
        if found := checkpoint.newest(run):
            saved, tensors = found
            check_continues(trainer.config, manifest, run, saved.meta)
            trainer.load_state(tensors)
            start = saved.step
            log.info("continuing run %s from its checkpoint of step %d", run.uri, start)
        elif trainer.config.train.init_from:
            _load_weights(trainer)
    if parallel.world() > 1:
        steps = torch.tensor(-1 if start is None else start, device=trainer.device)
        dist.broadcast(steps, src=0)
        start = None if int(steps) < 0 else int(steps)
        parallel.broadcast(trainer.state().values())
    return start


def _source(text: str) -> tuple[Store, checkpoint.Checkpoint]:
    """The run and the checkpoint that ``RUN[@STEP]`` names."""
    uri, _, step = text.rpartition("@") if "@" in text else (text, "", "")
    run = storage.open_store(uri)
    saved = checkpoint.steps(run)
    if not saved:
        raise UserError(f"train.init_from: {uri}: there is no checkpoint; is this STORAGE/NAME of a run?")
    if step and int(step) not in saved:
        raise UserError(f"train.init_from: {uri}: there is no checkpoint of step {step}; saved steps: {saved}")
    return run, _first_good(run, [int(step)] if step else reversed(saved))


def _first_good(run: Store, steps: Iterable[int]) -> checkpoint.Checkpoint:
    problem = CorruptData(run.uri)
    for step in steps:
        try:
            return checkpoint.verify(run, step)
        except CorruptData as error:
            log.warning("checkpoint of step %d is damaged and is passed over: %s", step, error)
            problem = problem if isinstance(problem, Unreadable) else error
    if isinstance(problem, Unreadable):
        raise problem
    raise UserError(f"train.init_from: no checkpoint is undamaged: {problem}")


def _check_fits(config: Config, other: Store, saved: checkpoint.Checkpoint) -> None:
    """Refuse weights of another architecture."""
    old, new = restore(saved.meta["config"], f"{other.uri}, its configuration").identity(), config.identity()
    for name in ("data.image_size", *sorted(name for name in new if name.startswith("model."))):
        if name != "model.dropout" and old.get(name) != new[name]:
            raise UserError(
                f"train.init_from: {other.uri} was trained with {name} {old.get(name)!r}, now it is {new[name]!r}:"
                " its weights do not fit"
            )


def _load_weights(trainer: Trainer) -> None:
    """Take over another run's networks; the optimisers begin anew."""
    assert trainer.config.train.init_from is not None
    other, saved = _source(trainer.config.train.init_from)
    _check_fits(trainer.config, other, saved)
    tensors = checkpoint.load_state(other, saved)
    state = {name: tensors.get(name, tensor) if not name.startswith("optimizer.") else tensor
             for name, tensor in trainer.state().items()}  # fmt: skip
    trainer.load_state(state)
    log.info("beginning with the weights of %s, step %d", other.uri, saved.step)
