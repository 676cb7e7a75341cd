"""Batches to the device that trains: on a GPU over a stream of copies beside the one that computes."""

import torch

from autopainter.data.stream import Batch


class Upload:
    """Takes batches to a device.

    The host runs ahead of a GPU: when it asks for a batch, the step before is still being computed, and the copy goes
    on at the same time. That takes pinned memory; from other memory, and to a CPU, the copy is done when the call is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device; what is computed from it on the current stream waits for its copy."""
        if self._copies is None:
            return batch.to(self._device)
        # Made on the stream of the copies, the tensors lie in memory of its own, which no step is still using. Pinned
        # memory is lent again by torch's allocator of it only when the copy from it is done.
        with torch.cuda.stream(self._copies):
            moved = batch.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        for tensor in moved.tensors():
            tensor.record_stream(computing)  # or the next copy could overwrite it before the step has used it
        return moved
