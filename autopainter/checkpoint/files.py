"""What a checkpoint is: its keys, its commit, its files, and how they are read again and checked."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from autopainter.errors import CorruptData, Unreadable, UserError, one_line
from autopainter.storage import Store

log = logging.getLogger(__name__)

FORMAT = "autopainter-checkpoint"
VERSION = 1
WEIGHTS, STATE = "weights.safetensors", "state.safetensors"
PAINTER = "average."  # tensors of this prefix are the painter's weights

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        step: steps that had been done; the run continues with the step of this number.
        attempt: the start of the run that wrote it.
        files: by name, their key in the run, size in bytes and sha256.
        meta: the data set's id and the configuration.
        score: validation score at this step, higher is better; None if it was not measured then.
        written: Unix time of the commit.
    """

    step: int
    attempt: int
    files: dict[str, dict[str, Any]]
    meta: dict[str, Any]
    score: float | None = None
    written: float = 0.0

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(int(entry["bytes"]) for entry in self.files.values())


def commit_key(step: int) -> str:
    """Key of the commit of a step."""
    return f"checkpoints/{step:08d}.json"


def file_key(step: int, attempt: int, name: str) -> str:
    """Key of a file of a checkpoint."""
    return f"checkpoints/{step:08d}/{attempt:06d}/{name}"


def steps(run: Store) -> list[int]:
    """Steps that a checkpoint was committed for, in rising order."""
    found = [re.fullmatch(r"checkpoints/(\d{8})\.json", entry.key) for entry in run.list("checkpoints/")]
    return sorted(int(match[1]) for match in found if match)


def encode(checkpoint: Checkpoint) -> bytes:
    """A commit's bytes: the document and a checksum of its own."""
    return _encode({"format": FORMAT, "version": VERSION, **vars(checkpoint)})


def _encode(document: dict[str, Any]) -> bytes:
    body = json.dumps(document, indent=1)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "commit": document}, indent=1).encode()


def read(run: Store, step: int) -> Checkpoint:
    """Read a commit.

    Raises:
        CorruptData: it is damaged; ``Unreadable`` if storage does not give it out.
        UserError: it is of another format version.
    """
    key = commit_key(step)
    data = _get(run, key, lambda: run.read(key))
    try:
        document = json.loads(data)["commit"]
        if _encode(document) != data or document["step"] != step:
            raise ValueError("its checksum is wrong")
        kind, version = document.pop("format"), document.pop("version")
        if (kind, version) != (FORMAT, VERSION):
            raise UserError(f"{run.locate(key)}: format {kind} {version}, but this program reads {FORMAT} {VERSION}")
        return Checkpoint(**document)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptData(f"{run.locate(key)}: damaged: {error}") from None


def load_weights(run: Store, checkpoint: Checkpoint) -> Tensors:
    """The averaged generator's tensors; ``CorruptData`` if the file is not what was written."""
    tensors = _load_file(run, checkpoint, WEIGHTS)
    return {name.removeprefix(PAINTER): tensor for name, tensor in tensors.items()}


def load_state(run: Store, checkpoint: Checkpoint) -> Tensors:
    """All tensors of the training state; ``CorruptData`` if a file is not what was written."""
    return _load_file(run, checkpoint, WEIGHTS) | _load_file(run, checkpoint, STATE)


def _load_file(run: Store, checkpoint: Checkpoint, name: str) -> Tensors:
    return safetensors.torch.load(read_file(run, checkpoint.files[name]))


def read_file(run: Store, entry: Mapping[str, Any]) -> bytes:
    """A file's bytes; ``CorruptData`` if they are not those that ``entry`` describes, or storage does not give them."""
    data = _get(run, entry["key"], lambda: run.read_large(entry["key"], entry["bytes"]))
    actual = hashlib.sha256(data).hexdigest()
    if actual != entry["sha256"]:
        raise CorruptData(
            f"{run.locate(entry['key'])}: {len(data)} bytes with sha256 {actual}, but {entry['bytes']} bytes"
            f" with sha256 {entry['sha256']} were written"
        )
    return data


def _get(run: Store, key: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except FileNotFoundError:
        raise CorruptData(f"{run.locate(key)}: missing") from None
    except CorruptData:
        raise
    except OSError as error:  # a bad sector, or storage that fails after all retries
        raise Unreadable(f"{run.locate(key)}: cannot be read: {error.strerror or one_line(error)}") from None


def verify(run: Store, step: int) -> Checkpoint:
    """Read a whole checkpoint; ``CorruptData`` if anything of it is not what was written."""
    checkpoint = read(run, step)
    for entry in checkpoint.files.values():
        read_file(run, entry)
    return checkpoint


def newest(run: Store, at_most: int | None = None) -> tuple[Checkpoint, Tensors] | None:
    """The newest checkpoint whose files are what was written, with its state; None if there is none.

    A damaged one is named in a warning and the one before it is tried.

    Args:
        at_most: the latest step that will do; none: any.

    Raises:
        Unreadable: none is good, and one cannot be read: nobody shall begin anew beside a state that may be whole.
    """
    unreadable: Unreadable | None = None
    for step in reversed(steps(run)):
        if at_most is not None and step > at_most:
            continue
        try:
            checkpoint = read(run, step)
            return checkpoint, load_state(run, checkpoint)
        except CorruptData as error:
            log.warning("checkpoint of step %d is damaged and is passed over: %s", step, error)
            unreadable = error if isinstance(error, Unreadable) else unreadable
    if unreadable:
        raise unreadable
    return None
