"""Ray Train's trainer and torch backend, without what this job has no use for."""

from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback


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


class LeanTrainer(TorchTrainer):
    """``TorchTrainer`` without Ray Data: for each group an actor of 200 MB, whose start takes 2 s of a core."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]
