"""Checkpoints: the state after some number of steps, written so that a half one is never taken for a whole one.

Layout under a run's folder or prefix:

    attempts/000003.json                         one for each start of the run; the highest is the one that may write
    checkpoints/00001200/000003/weights.safetensors   the averaged generator: all that painting needs
    checkpoints/00001200/000003/state.safetensors     everything else that training continues from
    checkpoints/00001200.json                    the commit: written last, by a conditional put, with each file's sha256

Files lie in a folder of their attempt, so two attempts that overlap (an old one may take a while to die) never mix
their files, and the conditional put lets one of them commit a step.
"""

from autopainter.checkpoint.attempts import Attempt, begin_attempt, latest_attempt, read_attempts
from autopainter.checkpoint.files import (
    Checkpoint,
    Tensors,
    load_state,
    load_weights,
    newest,
    read,
    steps,
    verify,
)
from autopainter.checkpoint.retention import Pruning, Retention, Survey, by_score, is_gone, survey
from autopainter.checkpoint.writer import CheckpointWriter

__all__ = [
    "Attempt",
    "Checkpoint",
    "CheckpointWriter",
    "Pruning",
    "Retention",
    "Survey",
    "Tensors",
    "begin_attempt",
    "by_score",
    "is_gone",
    "latest_attempt",
    "load_state",
    "load_weights",
    "newest",
    "read",
    "read_attempts",
    "steps",
    "survey",
    "verify",
]
