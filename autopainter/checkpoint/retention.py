"""Which checkpoints are kept, and how the others and what killed attempts left behind are deleted."""

import itertools
import logging
from dataclasses import dataclass, field

from autopainter.checkpoint import files
from autopainter.checkpoint.attempts import latest_attempt
from autopainter.checkpoint.files import Checkpoint
from autopainter.errors import CorruptData
from autopainter.storage import Store

log = logging.getLogger(__name__)


@dataclass
class Retention:
    """The newest checkpoints and the best ones are kept.

    Attributes:
        keep: number of newest checkpoints.
        keep_best: number of checkpoints with the highest scores.
        verified: steps whose files were read and found good.
    """

    keep: int
    keep_best: int = 0
    verified: set[int] = field(default_factory=set)

    def apply(self, run: Store, attempt: int, saved_step: int) -> None:
        """Delete all but what is kept, and the files of uncommitted checkpoints of this attempt and those before it.

        Nothing happens if a later attempt has begun. Commits of a later step than ``saved_step`` go: they belong to
        checkpoints that did not verify when the run was resumed.
        """
        if latest_attempt(run) > attempt:
            return
        kept = self.kept(run, saved_step)
        wanted = {files.commit_key(step) for step in kept}
        wanted |= {entry["key"] for checkpoint in kept.values() for entry in checkpoint.files.values()}
        run.delete(
            entry.key
            for entry in run.list("checkpoints/")
            if entry.key not in wanted and _attempt_of(entry.key) <= attempt
        )

    def kept(self, run: Store, saved_step: int) -> dict[int, Checkpoint]:
        """The checkpoints of steps up to ``saved_step`` that are kept."""
        good = (step for step in reversed(files.steps(run)) if step <= saved_step and self._is_good(run, step))
        newest = {step: files.read(run, step) for step in itertools.islice(good, self.keep)}
        older = {step: files.read(run, step) for step in good} if self.keep_best else {}
        scored = sorted((saved.score, step) for step, saved in (newest | older).items() if saved.score is not None)
        best = [step for _, step in scored[-self.keep_best :]] if self.keep_best else []
        return newest | {step: saved for step, saved in older.items() if step in best}

    def _is_good(self, run: Store, step: int) -> bool:
        """Whether a checkpoint is what was written; read once by each start of the run."""
        if step not in self.verified:
            try:
                files.verify(run, step)
            except CorruptData as error:
                log.warning("checkpoint of step %d is damaged and is deleted: %s", step, error)
                return False
            self.verified.add(step)
        return True


def _attempt_of(key: str) -> int:
    parts = key.split("/")
    return int(parts[2]) if len(parts) == 4 else 0
