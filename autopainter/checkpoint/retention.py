"""Which checkpoints are kept, and how the others and what killed attempts left behind are deleted."""

import itertools
import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from autopainter.checkpoint import files
from autopainter.checkpoint.attempts import latest_attempt
from autopainter.checkpoint.files import Checkpoint
from autopainter.errors import CorruptData, Unreadable
from autopainter.storage import Store, StoredObject

log = logging.getLogger(__name__)

FOLDER = "checkpoints/"
_COMMIT = re.compile(r"checkpoints/(\d{8})\.json")
_FILE = re.compile(r"checkpoints/(\d{8})/(\d{6})/[^/]+")  # step, attempt


@dataclass(frozen=True)
class Survey:
    """What a run has of checkpoints, by one listing and the commits.

    Attributes:
        entries: all objects in their folder.
        committed: those whose commit can be read, by step, in rising order.
        damaged: why a checkpoint is not what was written, by step; sizes are looked at, the bytes are not read.
        unreadable: those of the damaged ones that storage does not give out: they may still be good.
    """

    entries: list[StoredObject]
    committed: dict[int, Checkpoint]
    damaged: dict[int, str]
    unreadable: set[int] = field(default_factory=set)

    @property
    def steps(self) -> list[int]:
        """Steps that have a commit, be it damaged, in rising order."""
        return sorted(self.committed.keys() | self.damaged.keys())

    def keys(self, steps: Collection[int]) -> set[str]:
        """The commits of these steps, and the files that they name."""
        found = [self.committed[step] for step in steps if step in self.committed]
        named = {entry["key"] for saved in found for entry in saved.files.values()}
        return named | {files.commit_key(step) for step in steps}

    def note(self, step: int, error: CorruptData) -> None:
        """Note why a checkpoint is not good."""
        self.damaged[step] = str(error)
        if isinstance(error, Unreadable):
            self.unreadable.add(step)


def survey(run: Store) -> Survey:
    """Look at a run's checkpoints; ``UserError`` if one is of another format version."""
    entries = run.list(FOLDER)
    sizes = {entry.key: entry.bytes for entry in entries}
    found = Survey(entries, {}, {})
    for key in sizes:
        if not (match := _COMMIT.fullmatch(key)):
            continue
        step = int(match[1])
        try:
            found.committed[step] = saved = files.read(run, step)
        except CorruptData as error:
            if not is_gone(run, step):
                found.note(step, error)
            continue
        for entry in saved.files.values():
            if sizes.get(entry["key"]) != entry["bytes"]:
                has = f"{sizes[entry['key']]} bytes" if entry["key"] in sizes else "missing"
                found.damaged[step] = f"{run.locate(entry['key'])}: {has}, but {entry['bytes']} bytes were written"
    return found


def is_gone(run: Store, step: int) -> bool:
    """Whether a checkpoint has no commit any more: not damage, if a live run deletes its old ones meanwhile."""
    return run.size(files.commit_key(step)) is None


def by_score(committed: Mapping[int, Checkpoint]) -> list[int]:
    """Steps of the checkpoints that have a score, best first; of equal ones the later step first."""
    scored = [
        (saved.score, step)
        for step, saved in committed.items()
        if saved.score is not None and not math.isnan(saved.score)
    ]
    return [step for _, step in sorted(scored, reverse=True)]


@dataclass(frozen=True)
class Pruning:
    """What may be deleted of a run by somebody who does not train it.

    Attributes:
        found: what the run has.
        kept: steps that are kept, in rising order.
        unwanted: what may be deleted.
        spared: damaged steps after the newest good one: the latest attempt may be replacing them; and what cannot be
            read, which may be good.
        before: attempt and step before which nobody writes any more.
    """

    found: Survey
    kept: list[int]
    unwanted: list[StoredObject]
    spared: list[int]
    before: tuple[int, int]

    def uploads(self, run: Store, dry_run: bool = False) -> list[str]:
        """Keys of the unfinished uploads that nobody continues; they are aborted unless it is a dry run."""
        unwanted: list[str] = []

        def abort(key: str) -> bool:
            if not _is_before(key, self.before):
                return False
            unwanted.append(key)
            return not dry_run

        run.abort_uploads(FOLDER, abort)
        return unwanted

    def delete(self, run: Store) -> None:
        """Delete what is unwanted."""
        _delete(run, (entry.key for entry in self.unwanted))


@dataclass
class Retention:
    """The newest checkpoints and the best ones are kept.

    Attributes:
        keep: number of newest checkpoints.
        keep_best: number of checkpoints with the highest scores; they may be among the newest.
        verified: steps whose files were read and found good.
    """

    keep: int
    keep_best: int = 0
    verified: set[int] = field(default_factory=set)

    def apply(self, run: Store, attempt: int, saved_step: int) -> None:
        """Delete all but what is kept, and what is uncommitted of this attempt and those before it.

        Called by the attempt that writes, while it writes nothing. Nothing happens if a later attempt has begun.
        Checkpoints of a later step than ``saved_step`` go if they are damaged, as they were when the run was resumed.
        Good ones stay, and what cannot be read: storage may have hidden them then, and they are the run's progress.

        Raises:
            CorruptData: the checkpoint of ``saved_step`` is not good; nothing is deleted.
        """
        found = survey(run)
        kept = self.kept(run, found, saved_step)
        if saved_step not in kept:
            raise CorruptData(found.damaged.get(saved_step, f"{run.locate(files.commit_key(saved_step))}: missing"))
        known = set(self.verified)
        later = [step for step in found.steps if step > saved_step and self._is_good(run, found, step)]
        for step in sorted(set(later) - known):
            log.warning(
                "checkpoint of step %d is good, but this start did not see it: the next one goes on there", step
            )
        wanted = found.keys([*kept, *later])
        # After the listing: an attempt that begins from now on writes nothing that is in it.
        if latest_attempt(run) > attempt:
            return
        for step, reason in found.damaged.items():
            what_then = "cannot be read and is left alone" if step in found.unreadable else "is damaged and is deleted"
            log.warning("checkpoint of step %d %s: %s", step, what_then, reason)
        after = attempt + 1, 0
        keys = [entry.key for entry in found.entries if entry.key not in wanted]
        keys = [key for key in keys if step_of(key) not in found.unreadable]
        _delete(run, (key for key in keys if _COMMIT.fullmatch(key) or _is_before(key, after)))
        run.abort_uploads(FOLDER, lambda key: _is_before(key, after))

    def kept(self, run: Store, found: Survey, at_most: int | None = None) -> list[int]:
        """Steps that are kept, in rising order; damage that is met is noted in ``found``.

        Args:
            at_most: the latest step that may be kept; none: any.
        """
        committed = {step: saved for step, saved in found.committed.items() if at_most is None or step <= at_most}
        newest = (step for step in sorted(committed, reverse=True) if self._is_good(run, found, step))
        best = (step for step in by_score(committed) if self._is_good(run, found, step))
        return sorted({*itertools.islice(newest, self.keep), *itertools.islice(best, self.keep_best)})

    def pruning(self, run: Store) -> Pruning:
        """What may be deleted of a run that others may be training: never what the latest attempt may be writing.

        Raises:
            CorruptData: no checkpoint is good.
        """
        latest = latest_attempt(run)  # before the listing: the files of an attempt that begins now are left alone
        found = survey(run)
        kept = self.kept(run, found)
        if not kept:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in found.damaged.items())
            raise CorruptData(f"{run.uri}: no checkpoint is good, so none is deleted: {reasons or 'there is none'}")
        # The steps of an attempt rise. It is its own newest that counts: it may have passed over another's later one.
        own = [step for step, saved in found.committed.items() if saved.attempt == latest]
        before = latest, max(own, default=0)
        spared = sorted(step for step in found.damaged if step > max(kept) or step in found.unreadable)
        going = found.keys([step for step in found.steps if step not in (*kept, *spared)])
        left = found.keys(kept)
        unwanted = [
            entry
            for entry in found.entries
            if entry.key not in left
            and (entry.key in going or (_is_before(entry.key, before) and step_of(entry.key) not in spared))
        ]
        return Pruning(found, kept, unwanted, spared, before)

    def _is_good(self, run: Store, found: Survey, step: int) -> bool:
        """Whether a checkpoint is what was written; its bytes are read once by each start of the run."""
        if step in found.damaged or step not in found.committed:
            return False
        if step not in self.verified:
            try:
                files.verify(run, step)
            except CorruptData as error:
                if is_gone(run, step):
                    del found.committed[step]
                else:
                    found.note(step, error)
                return False
            self.verified.add(step)
        return True


def step_of(key: str) -> int | None:
    """Step of a commit or a file; None for what is no part of a checkpoint."""
    match = _COMMIT.fullmatch(key) or _FILE.fullmatch(key)
    return int(match[1]) if match else None


def _is_before(key: str, before: tuple[int, int]) -> bool:
    """Whether a key is that of a file of an earlier attempt, or of an earlier step of the same attempt."""
    match = _FILE.fullmatch(key)
    return match is not None and (int(match[2]), int(match[1])) < before


def _delete(run: Store, keys: Iterable[str]) -> None:
    """Delete commits first: wherever this is interrupted, no commit is left without its files."""
    several = list(keys)
    run.delete(key for key in several if _COMMIT.fullmatch(key))
    run.delete(key for key in several if not _COMMIT.fullmatch(key))
