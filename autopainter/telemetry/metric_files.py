"""The metrics of each worker in a small file of its own, which outlives the worker.

prometheus_client has a mode for several processes too, with memory-mapped files. There a full disk kills the process
that counts (SIGBUS), a process killed at the wrong moment leaves an empty file that every scrape fails at, and one
folder, named by an environment variable, is all that a process can have. Here a file is replaced as a whole.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from autopainter.telemetry.metric_list import METRICS, Metric

log = logging.getLogger(__name__)

Values = dict[tuple[Metric, tuple[str, ...]], float]
"""By metric and the values of its own labels."""

_ABANDONED_SECONDS = 86_400
_BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True)
class Recorded:
    """What one worker's file says.

    Attributes:
        begun: Unix time of the start of the run that wrote it: the same in the files of all its workers.
    """

    run: str
    rank: int
    begun: float
    values: Values

    def encode(self) -> bytes:
        """The file's content."""
        listed = [[metric.name, labels, value] for (metric, labels), value in self.values.items()]
        document = {"run": self.run, "rank": self.rank, "begun": self.begun, "values": listed}
        return json.dumps(document).encode()


def decode(data: bytes) -> Recorded:
    """Read a file's content; metrics that this program does not know are left out.

    Raises:
        ValueError: it is damaged.
    """
    try:
        document = json.loads(data)
        values: Values = {}
        for name, labels, value in document["values"]:
            metric = _BY_NAME.get(name)
            if metric and len(labels) == len(metric.labels):
                values[metric, tuple(map(str, labels))] = float(value)
        return Recorded(str(document["run"]), int(document["rank"]), float(document["begun"]), values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the metrics of a worker: {error!r}") from None


def files_of(folder: Path) -> Iterator[Path]:
    """The workers' files in a folder."""
    return folder.glob("*.json")


class Recorder:
    """The values of one worker, and its file.

    Values of the run as a whole are kept by worker 0 only; elsewhere recording them does nothing. Safe to use from
    several threads.

    Args:
        folder: where the file is; none: values are kept in memory only. Counters go on from the file that an earlier
            start of the run left there.
        begun: as in ``Recorded``.
    """

    def __init__(self, run: str, rank: int, begun: float, folder: Path | None) -> None:
        self._identity = run, rank, begun
        self._path = folder / f"{run}.{rank}.json" if folder else None
        self._values = self._counters_before()
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._failing = False

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._change(metric, labels, lambda before: value)

    def add(self, metric: Metric, amount: float, *labels: str) -> None:
        """Add to a counter; 0 makes it appear."""
        self._change(metric, labels, lambda before: before + amount)

    def reach(self, metric: Metric, total: float, *labels: str) -> None:
        """Bring a counter to what something else has counted, unless it is beyond that already."""
        self._change(metric, labels, lambda before: max(before, total))

    def write(self) -> None:
        """Write the file; a failure is a warning."""
        if self._path is None:
            return
        with self._writing:
            with self._lock:
                recorded = Recorded(*self._identity, dict(self._values))
            try:
                new = self._path.with_suffix(".new")
                new.write_bytes(recorded.encode())
                new.replace(self._path)
                self._failing = False
            except OSError as error:
                if not self._failing:
                    log.warning("metrics cannot be written: %s", error)
                self._failing = True

    def remove(self) -> None:
        """Remove the file, and the folder if no other worker's is in it."""
        if self._path:
            with contextlib.suppress(OSError):
                self._path.unlink()
                self._path.parent.rmdir()

    def _change(self, metric: Metric, labels: tuple[str, ...], value: Callable[[float], float]) -> None:
        assert len(labels) == len(metric.labels), metric.name
        if metric.of == "worker" or self._identity[1] == 0:
            with self._lock:
                self._values[metric, labels] = value(self._values.get((metric, labels), 0.0))

    def _counters_before(self) -> Values:
        """The counters that the file of an earlier start holds."""
        if self._path is None or not self._path.exists():
            return {}
        try:
            before = decode(self._path.read_bytes()).values
        except (OSError, ValueError) as error:
            log.warning("%s: damaged, counters begin at 0: %s", self._path, error)
            return {}
        return {key: value for key, value in before.items() if key[0].kind == "counter"}


def temporary_folder(run: str) -> Path:
    """The folder for a run's workers on this machine; those of runs that nobody continued for a day are removed.

    Raises:
        OSError: it cannot be made, or is another user's.
    """
    place = run if "://" in run else str(Path(run).absolute())
    prefix = f"autopainter-metrics-{os.getuid()}-"
    folder = Path(tempfile.gettempdir()) / f"{prefix}{hashlib.sha256(place.encode()).hexdigest()[:16]}"
    for old in folder.parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another worker was first
            if old != folder and old.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                shutil.rmtree(old)
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if about.st_uid != os.getuid() or not stat.S_ISDIR(about.st_mode):
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder
