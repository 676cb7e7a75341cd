"""The host of a worker on Ray: the driver's request to stop, nodes that are drained, reports to Ray Train."""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autopainter.host import Host

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 1.0


@ray.remote(num_cpus=0, max_restarts=-1)
class StopFlag:
    """The driver raises it, the workers wait for it. It lives on the driver's node."""

    def __init__(self) -> None:
        self._raised = asyncio.Event()
        self._waiting = 0

    async def wait(self) -> None:
        """Return when the flag is raised."""
        self._waiting += 1
        try:
            await self._raised.wait()
        finally:
            self._waiting -= 1

    async def raise_(self) -> int:
        """Raise the flag; the number of workers that waited for it."""
        waiting = self._waiting
        self._raised.set()
        return waiting


def stop_flag() -> Any:
    """A new flag on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return StopFlag.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class RayHost(Host):
    """What Ray and the driver ask of a worker.

    Args:
        flag: the driver's ``StopFlag``.
    """

    meeting_seconds = 5.0  # a meeting costs all workers about 12 ms

    def __init__(self, flag: Any) -> None:
        super().__init__()
        threading.Thread(target=self._listen, args=(flag,), name="stop-flag", daemon=True).start()

    def _listen(self, flag: Any) -> None:
        while True:
            try:
                ray.get(flag.wait.remote())
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
