"""Ray Train's torch backend, without its part in a group's end."""

from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class _SafeTorchBackend(_TorchBackend):
    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: a worker that ends well leaves the group itself, the others are killed.

        Ray 2.60 would ask all workers to leave the group. For one that hangs it waits 30 s; and if one was killed by
        Ray's own memory monitor, its controller takes that for a fault of its own and ends the run.
        """


@dataclass
class SafeTorchConfig(TorchConfig):
    """``TorchConfig`` with that backend."""

    @property
    def backend_cls(self) -> type[_SafeTorchBackend]:
        return _SafeTorchBackend
