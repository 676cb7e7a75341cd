"""The host of a worker on Ray: the driver's request to stop, nodes that are drained, reports to Ray Train."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autopainter.host import Host
from autopainter.progress import TrainingProgress

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 1.0
_LINES_KEPT = 1000  # of progress, while no driver asks for them


@ray.remote(num_cpus=0, max_restarts=-1)
class DriverLink:
    """Where driver and workers leave word for each other. It lives on the driver's node."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._waiting = 0
        self._progress: deque[TrainingProgress] = deque(maxlen=_LINES_KEPT)

    async def wait_for_stop(self) -> None:
        """Return when the driver wants the workers to stop."""
        self._waiting += 1
        try:
            await self._stop.wait()
        finally:
            self._waiting -= 1

    async def stop(self) -> int:
        """Ask the workers to stop; how many of them heard it."""
        waiting = self._waiting
        self._stop.set()
        return waiting

    async def tell(self, progress: TrainingProgress) -> None:
        """Leave word for the driver."""
        self._progress.append(progress)

    async def told(self) -> list[TrainingProgress]:
        """What has been told since the last call, oldest first."""
        told = list(self._progress)
        self._progress.clear()
        return told


def driver_link() -> Any:
    """A new one on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return DriverLink.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class RayHost(Host):
    """What Ray and the driver ask of a worker.

    Args:
        link: the driver's ``DriverLink``.
    """

    meeting_seconds = 5.0  # a meeting costs all workers about 12 ms

    def __init__(self, link: Any) -> None:
        super().__init__(show=link.tell.remote)
        threading.Thread(target=self._listen, args=(link,), name="driver-link", daemon=True).start()

    def _listen(self, link: Any) -> None:
        while True:
            try:
                ray.get(link.wait_for_stop.remote())
            except ray.exceptions.ActorUnavailableError:
                time.sleep(_AGAIN_SECONDS)  # it is being started again
            except Exception as error:  # the driver is gone, and Ray ends this worker too
                log.debug("nobody can ask for a stop any more: %s", error)
                return
            else:
                self.stop()
                return

    def leaving(self) -> bool:
        """Whether a node that runs a worker of this group is being drained."""
        return ray.train.get_preemption_info() is not None

    def saved(self, step: int, uri: str, metrics: Mapping[str, float]) -> None:
        """Tell Ray Train of a checkpoint.

        Ray gets a name in the folder of its own notes, where there is nothing: checkpoints are the library's.
        """
        notes = ray.train.get_context().get_storage()
        named = Checkpoint(f"{notes.experiment_fs_path}/{step:08d}", notes.storage_filesystem) if uri else None
        ray.train.report(
            {"step": step, "checkpoint": uri, **metrics},
            checkpoint=named,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
