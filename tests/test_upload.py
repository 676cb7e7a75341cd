"""Batches on their way to the device; what a GPU does with them is in test_gpu.py.

Run: pytest tests/test_upload.py
"""

import torch
from test_trainer import batch

from autopainter.data.upload import Upload


def test_on_a_cpu_a_batch_is_not_copied():
    whole = batch(0)
    moved = Upload(torch.device("cpu"))(whole)
    assert (moved.step, moved.keys) == (whole.step, whole.keys)
    assert [tensor.data_ptr() for tensor in moved.tensors()] == [tensor.data_ptr() for tensor in whole.tensors()]
