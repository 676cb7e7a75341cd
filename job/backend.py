"""Ray Train's torch backend, made safe against a worker that Ray's own memory monitor killed."""

import logging
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

log = logging.getLogger(__name__)


class _SafeTorchBackend(_TorchBackend):
    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        # Ray 2.60 lets the OutOfMemoryError of a dead worker pass here, which its controller takes for a fault of its
        # own and ends the run instead of reporting the dead worker.
        try:
            super().on_shutdown(worker_group, backend_config)
        except Exception:
            log.warning("the process group could not be shut down; its workers are ended anyway", exc_info=True)


@dataclass
class SafeTorchConfig(TorchConfig):
    """``TorchConfig`` whose shutdown never fails the run."""

    @property
    def backend_cls(self) -> type[_SafeTorchBackend]:
        return _SafeTorchBackend
