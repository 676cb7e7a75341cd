"""The guard against losses that are no numbers: it stops the run and names the samples, for ``replay``."""

import json
import math
from collections.abc import Sequence

from autopainter import journal, parallel
from autopainter.config import Config
from autopainter.data.manifest import Manifest
from autopainter.data.stream import keys_of_step
from autopainter.errors import Diverged
from autopainter.storage import Store
from autopainter.trainer import SCALARS


def check(values: Sequence[float], done: int, run: Store, manifest: Manifest, config: Config) -> None:
    """Check the values that ``SCALARS`` names.

    Raises:
        Diverged: one is not finite. Worker 0 leaves the keys of the step's samples in ``diverged/STEP.json``.
    """
    terms = [name for name, value in zip(SCALARS, values, strict=True) if not math.isfinite(value)]
    if not terms:
        return
    key = f"diverged/{done:08d}.json"
    text = (
        f"step {done}: {', '.join(terms)} not finite; the last checkpoint is kept; the step's samples are named in"
        f" {run.locate(key)}, and 'autopainter replay {run.uri}@{done}' does the step again"
    )
    if parallel.rank() == 0:
        keys = keys_of_step(manifest, config, done - 1)
        values_by_name = {name: str(value) for name, value in zip(SCALARS, values, strict=True)}
        run.write(key, json.dumps({"step": done, "values": values_by_name, "samples": keys}, indent=1).encode())
        journal.write(run, "diverged", text, done)
    raise Diverged(text)
