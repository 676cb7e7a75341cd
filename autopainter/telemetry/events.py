"""TensorBoard events, written to a local file and uploaded on a timer.

Object stores cannot append, so each upload sends the whole file; writing straight to s3:// would do that at every
flush. Each start of a run writes a file of its own and tells TensorBoard to drop what earlier files hold from that
step on (``purge_step``), so the curves are continuous over a resume and no step is doubled.
"""

import logging
import threading
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard.writer import SummaryWriter

from autopainter.errors import UserError
from autopainter.scratch import ScratchFolder
from autopainter.storage import Store

log = logging.getLogger(__name__)


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
        self._folder = ScratchFolder("events")
        self._writer = SummaryWriter(str(self._folder.path), purge_step=start_step + 1)
        self._uploaded: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._upload_regularly, args=(upload_seconds,), daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record values at a step (the number of steps done)."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Record a uint8 [H, W, 3] RGB picture."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def upload(self) -> None:
        """Upload what has been recorded; a failure is a warning, the next upload sends it again."""
        with self._lock:
            try:
                self._writer.flush()
                for path in self._folder.files():
                    data = path.read_bytes()
                    if self._uploaded.get(path.name) != len(data):
                        self._run.write(f"events/{self._prefix}{path.name}", data)
                        self._uploaded[path.name] = len(data)
            except (OSError, UserError) as error:
                log.warning("TensorBoard events could not be uploaded, will try again: %s", error)

    def close(self) -> None:
        """Upload the rest and end the thread."""
        self._closed.set()
        self._thread.join()
        self.upload()
        self._writer.close()
        self._folder.remove()

    def _upload_regularly(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            self.upload()
