"""TensorBoard events, written to a local file and uploaded on a timer.

Object stores cannot append, so each upload sends the whole file; writing straight to s3:// would do that at every
flush. A file that has grown large is ended, and once it is uploaded nothing of it is kept here. Each start of a run
begins with a file of its own and tells TensorBoard to drop what earlier files hold from that step on (``purge_step``),
so the curves are continuous over a resume and no step is doubled.

Events are no reason to stop: what cannot be written here, on a full disk say, is lost with one warning, and each upload
tries to begin a new file.
"""

import contextlib
import functools
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from autopainter.config import Config
from autopainter.errors import UserError
from autopainter.scratch import ScratchFolder
from autopainter.storage import Store

log = logging.getLogger(__name__)

METRICS = ("validation/psnr", "validation/psnr_with_hints", "generator/loss", "discriminator/loss")
"""What TensorBoard's table of hyperparameters shows beside them."""

FILE_BYTES = 16 << 20
"""A file that has grown beyond this is followed by a new one."""

_PROBE_BYTES = 1 << 16


class EventWriter:
    """Scalars and pictures of one start of a run.

    Args:
        run: the run's store; files go under ``events/``.
        attempt: number of this start of the run, by which TensorBoard finds the order of the files.
        start_step: steps that were done before this start.
        upload_seconds: time between uploads.
    """

    def __init__(self, run: Store, attempt: int, start_step: int, upload_seconds: float) -> None:
        self._run = run
        self._prefix = f"{attempt:06d}."
        self._folder: ScratchFolder | None = None
        self._files = 0
        self._purge_step: int | None = start_step + 1  # for the first file
        self._writer: SummaryWriter | None = None
        self._losing = False  # and has said so
        self._uploaded: dict[Path, int] = {}
        self._uploading = threading.Lock()
        self._writing = threading.Lock()  # held while the writer is used or changed, never while files are uploaded
        self._begin()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._upload_regularly, args=(upload_seconds,), daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record values at a step (the number of steps done)."""
        for name, value in values.items():
            self._record(functools.partial(SummaryWriter.add_scalar, tag=name, scalar_value=value, global_step=step))

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Record a uint8 [H, W, 3] RGB picture."""
        self._record(
            functools.partial(SummaryWriter.add_image, tag=name, img_tensor=image, global_step=step, dataformats="HWC")
        )

    def configuration(self, config: Config, step: int) -> None:
        """Record the configuration of this start: as text, and as hyperparameters what may never change in a run."""
        self._record(
            functools.partial(
                SummaryWriter.add_text,
                tag="configuration",
                text_string=f"```yaml\n{config.to_yaml()}```",
                global_step=step,
            )
        )
        values = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in config.identity().items()
        }
        summaries = hparams(values, dict.fromkeys(METRICS))

        def write(writer: SummaryWriter) -> None:
            for summary in summaries:  # SummaryWriter.add_hparams would begin a run of its own for them
                writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]

        self._record(write)

    def _record(self, write: Callable[[SummaryWriter], None]) -> None:
        with self._writing:
            self._try(write)

    def _try(self, write: Callable[[SummaryWriter], None]) -> None:
        """Use the writer; when the local file is gone, swept away by a cleaner of old files, begin a new one."""
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:
            self._begin()
            if self._writer:
                log.warning("TensorBoard events were lost, a new file is begun: %s", error)

    def upload(self) -> None:
        """Upload what has been recorded; a failure is a warning, the next upload sends it again."""
        with self._uploading:
            try:
                with self._writing:
                    if self._writer is None:
                        self._begin()
                    self._try(SummaryWriter.flush)
                    files = self._local()
                    ended = files[:-1] if self._writer else files
                    if self._writer and self._size(files) > FILE_BYTES:
                        self._writer.close()
                        self._begin()
                        ended = files
                for path in files:
                    self._upload(path)
                    if path in ended:
                        path.unlink()
            except (OSError, UserError) as error:
                log.warning("TensorBoard events could not be uploaded, will try again: %s", error)

    def _begin(self) -> None:
        """Begin the next file, in a folder of its own: the writer's names do not tell the order of files of one second.

        If that fails, there is no writer.
        """
        self._writer = None
        try:
            self._folder = self._folder or ScratchFolder("events")
            self._files += 1
            place = self._folder.path / f"{self._files:06d}"
            try:
                place.mkdir(parents=True)
                (probe := place / "probe").write_bytes(bytes(_PROBE_BYTES))  # a writer ends with a traceback instead
                probe.unlink()
                self._writer = SummaryWriter(str(place), purge_step=self._purge_step)
            except OSError:
                shutil.rmtree(place, ignore_errors=True)
                raise
        except OSError as error:
            if not self._losing:
                log.warning("TensorBoard events are lost until they can be written here again: %s", error)
            self._losing = True
            return
        if self._losing:
            log.info("TensorBoard events are recorded again")
        self._losing, self._purge_step = False, None

    def _local(self) -> list[Path]:
        """The files that are here, oldest first."""
        return sorted(self._folder.path.glob("*/*")) if self._folder else []

    def _size(self, files: list[Path]) -> int:
        """Size of the file that is written now; ``FileNotFoundError`` if it has been swept away."""
        if not files:
            raise FileNotFoundError("the local file is gone")
        return files[-1].stat().st_size

    def _upload(self, path: Path) -> None:
        data = path.read_bytes()
        if self._uploaded.get(path) != len(data):
            self._run.write(f"events/{self._prefix}{path.parent.name}.{path.name}", data)
            self._uploaded = {path: len(data)}

    def close(self) -> None:
        """Upload the rest and end the thread."""
        self._closed.set()
        self._thread.join()
        self.upload()
        with contextlib.suppress(OSError):  # the local file is gone; upload has said so
            if self._writer:
                self._writer.close()
        if self._folder:
            self._folder.remove()

    def _upload_regularly(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            self.upload()
