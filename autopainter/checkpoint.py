"""Checkpoints: the state after some number of steps, written so that a half one is never taken for a whole one.

Layout under a run's folder or prefix:

    attempts/000003.json                         one for each start of the run; the highest is the one that may write
    checkpoints/00001200/000003/weights.safetensors   the averaged generator: all that painting needs
    checkpoints/00001200/000003/state.safetensors     everything else that training continues from
    checkpoints/00001200.json                    the commit: written last, by a conditional put, with each file's sha256

Files lie in a folder of their attempt, so two attempts that overlap (an old one may take a while to die) never mix
their files, and the conditional put lets one of them commit a step.
"""

import hashlib
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from autopainter.errors import CorruptData, StorageError, UserError
from autopainter.storage import Store

log = logging.getLogger(__name__)

FORMAT = "autopainter-checkpoint"
VERSION = 1
_WEIGHTS, _STATE = "weights.safetensors", "state.safetensors"
_PAINTER = "average."  # tensors of this prefix are the painter's weights

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        step: steps that had been done; the run continues with the step of this number.
        attempt: the start of the run that wrote it.
        files: by name, their key in the run, size in bytes and sha256.
        meta: the configuration's identity, the data set's id, and the configuration.
    """

    step: int
    attempt: int
    files: dict[str, dict[str, Any]]
    meta: dict[str, Any]


def _commit_key(step: int) -> str:
    return f"checkpoints/{step:08d}.json"


def begin_attempt(run: Store, info: Mapping[str, Any]) -> int:
    """Take the next attempt number; from then on checkpoints of earlier attempts are refused."""
    while True:
        number = latest_attempt(run) + 1
        record = json.dumps({"attempt": number, "id": uuid.uuid4().hex, "started": time.time(), **info}).encode()
        if run.create(f"attempts/{number:06d}.json", record):
            return number


def latest_attempt(run: Store) -> int:
    """The highest attempt number, 0 before the first."""
    found = [re.fullmatch(r"attempts/(\d{6})\.json", entry.key) for entry in run.list("attempts/")]
    return max((int(match[1]) for match in found if match), default=0)


def steps(run: Store) -> list[int]:
    """Steps that a checkpoint was committed for, in rising order."""
    found = [re.fullmatch(r"checkpoints/(\d{8})\.json", entry.key) for entry in run.list("checkpoints/")]
    return sorted(int(match[1]) for match in found if match)


def _encode(document: dict[str, Any]) -> bytes:
    """A commit's bytes: the document and a checksum of its own."""
    body = json.dumps(document, indent=1)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "commit": document}, indent=1).encode()


def read(run: Store, step: int) -> Checkpoint:
    """Read a commit.

    Raises:
        CorruptData: it is damaged.
        UserError: it is of another format version.
    """
    key = _commit_key(step)
    try:
        data = run.read(key)
        document = json.loads(data)["commit"]
        if _encode(document) != data or document["step"] != step:
            raise ValueError("its checksum is wrong")
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise UserError(
                f"{run.locate(key)}: format {document['format']} {document['version']},"
                f" but this program reads {FORMAT} {VERSION}"
            )
        return Checkpoint(document["step"], document["attempt"], document["files"], document["meta"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise CorruptData(f"{run.locate(key)}: damaged: {error}") from None


def load_weights(run: Store, checkpoint: Checkpoint) -> Tensors:
    """The averaged generator's tensors; ``CorruptData`` if the file is not what was written."""
    tensors = _load_file(run, checkpoint, _WEIGHTS)
    return {name.removeprefix(_PAINTER): tensor for name, tensor in tensors.items()}


def load_state(run: Store, checkpoint: Checkpoint) -> Tensors:
    """All tensors of the training state; ``CorruptData`` if a file is not what was written."""
    return _load_file(run, checkpoint, _WEIGHTS) | _load_file(run, checkpoint, _STATE)


def _load_file(run: Store, checkpoint: Checkpoint, name: str) -> Tensors:
    return safetensors.torch.load(_read_verified(run, checkpoint.files[name]))


def _read_verified(run: Store, entry: Mapping[str, Any]) -> bytes:
    """A file's bytes; ``CorruptData`` if they are not those that ``entry`` describes."""
    try:
        data = run.read(entry["key"])
    except FileNotFoundError:
        raise CorruptData(f"{run.locate(entry['key'])}: missing") from None
    actual = hashlib.sha256(data).hexdigest()
    if actual != entry["sha256"]:
        raise CorruptData(
            f"{run.locate(entry['key'])}: {len(data)} bytes with sha256 {actual}, but {entry['bytes']} bytes"
            f" with sha256 {entry['sha256']} were written"
        )
    return data


def newest(run: Store) -> tuple[Checkpoint, Tensors] | None:
    """The newest checkpoint whose files are what was written, with its state; None if there is none.

    A damaged one is named in a warning and the one before it is tried.
    """
    for step in reversed(steps(run)):
        try:
            checkpoint = read(run, step)
            return checkpoint, load_state(run, checkpoint)
        except CorruptData as error:
            log.warning("checkpoint of step %d is damaged and is passed over: %s", step, error)
    return None


class CheckpointWriter:
    """Writes checkpoints in the background while training goes on.

    ``save`` copies the tensors and returns; one thread writes the copy. A save that comes while the one before is
    still being written waits for it, so at most one copy is alive.

    Args:
        run: the run's store.
        attempt: what ``begin_attempt`` gave this start of the run.
        keep: newest checkpoints that are kept.
        meta: what each checkpoint says of the run.
        report: called in the writing thread after each save with its step, its seconds, and the error if it failed.

    Attributes:
        error: why the last save failed, None if it did not.
    """

    def __init__(
        self,
        run: Store,
        attempt: int,
        keep: int,
        meta: Mapping[str, Any],
        report: Callable[[int, float, Exception | None], None] = lambda step, seconds, error: None,
    ) -> None:
        self.run = run
        self.attempt = attempt
        self.keep = keep
        self.meta = dict(meta)
        self.error: Exception | None = None
        self._report = report
        self._verified: set[int] = set()
        self._thread: threading.Thread | None = None

    def save(
        self, step: int, state: Mapping[str, torch.Tensor], before_commit: Callable[[], None] = lambda: None
    ) -> None:
        """Save the state after ``step`` steps; the tensors may change as soon as this returns.

        Args:
            before_commit: called in the writing thread when the files are written, before the commit.
        """
        self.wait()
        copy = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
        self._thread = threading.Thread(
            target=self._write, args=(step, copy, before_commit), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, state: Tensors, before_commit: Callable[[], None]) -> None:
        began = time.perf_counter()
        self.error = None
        try:
            self._commit(step, state, before_commit)
        except Exception as error:  # nobody else would hear of it in this thread
            self.error = error
            log.warning("checkpoint of step %d could not be saved, training goes on: %s", step, error)
        else:
            self._verified.add(step)
            try:
                self._prune(step)
            except (OSError, UserError) as error:
                log.warning("old checkpoints could not be deleted, will try again: %s", error)
        self._report(step, time.perf_counter() - began, self.error)

    def _commit(self, step: int, state: Tensors, before_commit: Callable[[], None]) -> None:
        weights = {name: tensor for name, tensor in state.items() if name.startswith(_PAINTER)}
        rest = {name: tensor for name, tensor in state.items() if name not in weights}
        files = {}
        for name, tensors in ((_WEIGHTS, weights), (_STATE, rest)):
            data = safetensors.torch.save(tensors)
            key = f"checkpoints/{step:08d}/{self.attempt:06d}/{name}"
            self.run.write(key, data)
            files[name] = {"key": key, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            _read_verified(self.run, files[name])
        before_commit()
        if (newer := latest_attempt(self.run)) > self.attempt:
            raise StorageError(f"{self.run.uri}: attempt {newer} has taken over from this attempt {self.attempt}")
        document = {"format": FORMAT, "version": VERSION, "step": step, "attempt": self.attempt,
                    "files": files, "meta": self.meta}  # fmt: skip
        data = _encode(document)
        if not self.run.create(_commit_key(step), data):
            # A checkpoint of this step that did not verify when the run was resumed: this one replaces it.
            self.run.write(_commit_key(step), data)
        log.info("checkpoint of step %d saved", step)

    def _prune(self, saved_step: int) -> None:
        """Delete all but the newest good checkpoints, and what this attempt and those before it left behind.

        A commit of a later step than the one just saved belongs to a checkpoint that did not verify on resume.
        """
        if latest_attempt(self.run) > self.attempt:
            return
        wanted: set[str] = set()
        kept = 0
        for step in reversed([step for step in steps(self.run) if step <= saved_step]):
            if kept < self.keep and self._is_good(step):
                kept += 1
                wanted |= {_commit_key(step), *(entry["key"] for entry in read(self.run, step).files.values())}
        self.run.delete(
            entry.key
            for entry in self.run.list("checkpoints/")
            if entry.key not in wanted and _attempt_of(entry.key) <= self.attempt
        )

    def _is_good(self, step: int) -> bool:
        """Whether a checkpoint is what was written; read once by each start of the run."""
        if step not in self._verified:
            try:
                for entry in read(self.run, step).files.values():
                    _read_verified(self.run, entry)
            except CorruptData as error:
                log.warning("checkpoint of step %d is damaged and is deleted: %s", step, error)
                return False
            self._verified.add(step)
        return True


def _attempt_of(key: str) -> int:
    parts = key.split("/")
    return int(parts[2]) if len(parts) == 4 else 0
