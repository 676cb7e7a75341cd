"""The guard against losses that are no numbers: it stops the run and names the samples, for ``replay``."""

import json
import logging
import math
from collections.abc import Sequence

from autopainter import journal, parallel
from autopainter.config import Config
from autopainter.data.manifest import Manifest
from autopainter.data.stream import keys_of_step
from autopainter.errors import Diverged, UserError
from autopainter.storage import Store
from autopainter.trainer import SCALARS

log = logging.getLogger(__name__)


def key(done: int) -> str:
    """Key of what the guard leaves of the step that was the ``done``-th."""
    return f"diverged/{done:08d}.json"


def check(values: Sequence[float], done: int, run: Store, manifest: Manifest, config: Config) -> None:
    """Check the values that ``SCALARS`` names.

    Raises:
        Diverged: one is not finite. Worker 0 leaves the keys of the step's samples in ``diverged/STEP.json``, with
            all that is needed to do the step again without a checkpoint.
    """
    by_name = dict(zip(SCALARS, values, strict=True))
    terms = [name for name, value in by_name.items() if not math.isfinite(value)]
    if not terms:
        return
    text = (
        f"step {done}: {', '.join(terms)} not finite; the last checkpoint is kept; the step's samples are named in"
        f" {run.locate(key(done))}, and 'autopainter replay {run.uri}@{done}' does the step again"
    )
    if parallel.rank() == 0:
        document = {
            "step": done,
            "values": {name: str(value) for name, value in by_name.items()},
            "samples": keys_of_step(manifest, config, done - 1),
            "workers": parallel.world(),
            "manifest_id": manifest.id,
            "config": config.model_dump(mode="json"),
        }
        try:
            run.write(key(done), json.dumps(document, indent=1).encode())
        except (OSError, UserError) as error:  # the reason to stop is another one
            log.warning("%s could not be written: %s", run.locate(key(done)), error)
        journal.write(run, "diverged", text, done)
    raise Diverged(text)
