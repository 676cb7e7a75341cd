"""Ways to save a checkpoint, for `bench_checkpoint.py`: ours, torch.save in the loop, and Ray Train's report()."""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import botocore.config
import torch

from autopainter.checkpoint import CheckpointWriter, Retention, Tensors, begin_attempt
from autopainter.storage import open_store

BUCKET = "runs"

DURABLE_SECONDS = 300.0
"""A checkpoint that takes longer is taken for lost, and its method is given up."""


class Method(NamedTuple):
    """A way to save, as the table shows it."""

    title: str
    commit: str
    verified: str
    needs: frozenset[str] = frozenset()


METHODS = {
    "ours-folder": Method("ours, folder", "atomic; synced", "read back, sha256"),
    "ours-s3": Method("ours, S3", "atomic", "read back, sha256", frozenset({"s3"})),
    "save": Method("torch.save + fsync, folder", "none: a kill leaves half a file", "no"),
    "save-upload": Method("torch.save + boto3 upload, S3", "atomic for one object", "no", frozenset({"s3"})),
    "report": Method("Ray report() sync, S3", "controller's snapshot, after the call", "no", frozenset({"s3", "ray"})),
    "report-async": Method("Ray report() async, S3", "controller's snapshot", "no", frozenset({"s3", "ray"})),
}


class Saver:
    """One method at work; ``durable_at`` is set when the checkpoint can be relied on."""

    def __init__(self) -> None:
        self.durable_at: float | None = None

    def save(self, step: int, state: Tensors) -> None:
        """What the training thread does."""
        raise NotImplementedError

    def settled(self) -> bool:
        """Whether the checkpoint is durable and nothing goes on in the background; raises what went wrong there."""
        return self.durable_at is not None

    def clean(self) -> None:
        """Delete what is not needed any more, out of the measured time."""


class Ours(Saver):
    """This project's writer; keeps one checkpoint, so the one before is deleted in the background."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        store = open_store(uri)
        self.writer = CheckpointWriter(store, begin_attempt(store, {}), Retention(keep=1), {})

    def save(self, step: int, state: Tensors) -> None:
        self.writer.save(step, state)

    def settled(self) -> bool:
        if self.writer.busy:
            return False
        if self.writer.error:
            raise self.writer.error
        self.durable_at = self.writer.saved_at
        return True


class TorchSave(Saver):
    """``torch.save`` in the loop; then it syncs the file, or uploads it if there is a bucket."""

    def __init__(self, folder: Path, upload: bool) -> None:
        super().__init__()
        self.folder = folder
        folder.mkdir()
        settings = botocore.config.Config(s3={"addressing_style": "path"})
        self.client = boto3.client("s3", config=settings) if upload else None

    def save(self, step: int, state: Tensors) -> None:
        path = self.folder / f"{step}.pt"
        torch.save(state, path)
        if self.client:
            self.client.upload_file(str(path), BUCKET, f"{self.folder.name}/{path.name}")
        else:
            for place in (path, self.folder):
                handle = os.open(place, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
        self.durable_at = time.monotonic()

    def clean(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


class Report(Saver):
    """``ray.train.report()`` of a folder with one file of ``torch.save``, as in Ray's documentation."""

    def __init__(self, folder: Path, asynchronous: bool) -> None:
        super().__init__()
        self.folder, self.asynchronous = folder, asynchronous
        folder.mkdir()
        self._error: Exception | None = None

    def save(self, step: int, state: Tensors) -> None:
        from ray.train import CheckpointUploadMode

        # The asynchronous mode deletes the folder itself when it is uploaded.
        if self.asynchronous:
            self._report(tempfile.mkdtemp(dir=self.folder), step, state, CheckpointUploadMode.ASYNC)
        else:
            with tempfile.TemporaryDirectory(dir=self.folder) as place:
                self._report(place, step, state, CheckpointUploadMode.SYNC)
        threading.Thread(target=self._wait_for_commit, daemon=True).start()

    def _report(self, place: str, step: int, state: Tensors, mode: Any) -> None:
        import ray.train

        torch.save(state, Path(place, "state.pt"))
        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint.from_directory(place),
            checkpoint_dir_name=f"{self.folder.name}-{step:08d}",
            checkpoint_upload_mode=mode,
        )

    def _wait_for_commit(self) -> None:
        import ray.train

        # report() returns before the controller has written the snapshot that makes the checkpoint count.
        try:
            ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED, DURABLE_SECONDS)
            self.durable_at = time.monotonic()
        except Exception as error:  # told by the training thread
            self._error = error

    def settled(self) -> bool:
        if self._error:
            raise self._error
        return super().settled()


def make_saver(name: str, folder: Path) -> Saver:
    """The method of a name, with its own place."""
    makers: dict[str, Callable[[], Saver]] = {
        "ours-folder": lambda: Ours(str(folder / name)),
        "ours-s3": lambda: Ours(f"s3://{BUCKET}/{name}"),
        "save": lambda: TorchSave(folder / name, upload=False),
        "save-upload": lambda: TorchSave(folder / name, upload=True),
        "report": lambda: Report(folder / name, asynchronous=False),
        "report-async": lambda: Report(folder / name, asynchronous=True),
    }
    return makers[name]()
