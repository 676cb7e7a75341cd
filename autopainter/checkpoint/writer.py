"""Writing checkpoints in the background while training goes on."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch

from autopainter.checkpoint import files
from autopainter.checkpoint.attempts import latest_attempt
from autopainter.checkpoint.files import Checkpoint, Tensors
from autopainter.checkpoint.retention import Retention
from autopainter.errors import Superseded, UserError
from autopainter.storage import Store

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints in the background while training goes on.

    ``save`` copies the tensors and returns; one thread writes the copy. A save that comes while the one before is
    still being written waits for it, so there is one copy, in memory that is kept from one save to the next: to get
    fresh pages from the system takes several times as long as the copying.

    Args:
        run: the run's store.
        attempt: what ``begin_attempt`` gave this start of the run.
        retention: which checkpoints are kept.
        meta: what each checkpoint says of the run.
        report: called in the writing thread after each save with its step, its seconds, and the error if it failed.

    Attributes:
        error: why the last save that has ended failed, None if it did not.
        saved: the last checkpoint that was committed, None before the first.
        saved_at: ``time.monotonic()`` of that, or of the writer's making.
    """

    def __init__(
        self,
        run: Store,
        attempt: int,
        retention: Retention,
        meta: Mapping[str, Any],
        report: Callable[[int, float, Exception | None], None] = lambda step, seconds, error: None,
    ) -> None:
        self.run = run
        self.attempt = attempt
        self.retention = retention
        self.meta = dict(meta)
        self.error: Exception | None = None
        self.saved: Checkpoint | None = None
        self.saved_at = time.monotonic()
        self._report = report
        self._thread: threading.Thread | None = None
        self._copy: Tensors = {}

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self,
        step: int,
        state: Mapping[str, torch.Tensor],
        score: float | None = None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Save the state after ``step`` steps; the tensors may change as soon as this returns.

        Args:
            score: validation score at this step, None if it was not measured.
            before_commit: called in the writing thread when the files are written, before the commit.
        """
        self.wait()
        self._take(state)
        self._thread = threading.Thread(
            target=self._write, args=(step, self._copy, score, before_commit), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _take(self, state: Mapping[str, torch.Tensor]) -> None:
        if {name: _kind(tensor) for name, tensor in self._copy.items()} != {
            name: _kind(tensor) for name, tensor in state.items()
        }:
            self._copy = {
                name: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
                for name, tensor in state.items()
            }
        for name, tensor in state.items():
            self._copy[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in state.values()):
            torch.cuda.synchronize()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, state: Tensors, score: float | None, before_commit: Callable[[], None]) -> None:
        began = time.perf_counter()
        try:
            self.saved = self._commit(step, state, score, before_commit)
        except Exception as error:  # nobody else would hear of it in this thread
            self.error = error
            goes_on = "" if isinstance(error, Superseded) else ", training goes on"
            log.warning("checkpoint of step %d could not be saved%s: %s", step, goes_on, error)
        else:
            self.error = None  # not before: whoever looks while a save runs shall hear of the one before
            self.saved_at = time.monotonic()
            self.retention.verified.add(step)
            try:
                self.retention.apply(self.run, self.attempt, step)
            except (OSError, UserError) as error:
                log.warning("old checkpoints could not be deleted, will try again: %s", error)
        self._report(step, time.perf_counter() - began, self.error)

    def _commit(self, step: int, state: Tensors, score: float | None, before_commit: Callable[[], None]) -> Checkpoint:
        weights = {name: tensor for name, tensor in state.items() if name.startswith(files.PAINTER)}
        rest = {name: tensor for name, tensor in state.items() if name not in weights}
        written = {
            name: self._write_file(files.file_key(step, self.attempt, name), tensors)
            for name, tensors in ((files.WEIGHTS, weights), (files.STATE, rest))
        }
        before_commit()
        self._check_fence()
        checkpoint = Checkpoint(step, self.attempt, written, self.meta, score, time.time())
        key, data = files.commit_key(step), files.encode(checkpoint)
        try:
            created = self.run.create(key, data)
        except OSError:  # what is there cannot be read; or storage fails, as it will then below
            created = False
        if not created:
            # Either a checkpoint of this step did not verify when the run was resumed, and this one replaces it; or
            # a later attempt has begun since the fence was looked at, and committed the step.
            self._check_fence()
            self.run.write(key, data)
        log.info("checkpoint of step %d saved", step)
        return checkpoint

    def _write_file(self, key: str, tensors: Tensors) -> dict[str, Any]:
        """Write a file and read it back; its entry in the commit."""
        data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        self.run.write(key, data)
        entry = {"key": key, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        del data  # a state may take gigabytes
        files.read_file(self.run, entry)
        return entry

    def _check_fence(self) -> None:
        if (newer := latest_attempt(self.run)) > self.attempt:
            raise Superseded(f"{self.run.uri}: attempt {newer} has taken over from this attempt {self.attempt}")


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
