"""How a process computes: what decides its numbers to the bit."""

import logging
import os

import torch

from autopainter import parallel
from autopainter.cgroup import Groups
from autopainter.config import Config
from autopainter.errors import UserError
from autopainter.processor import BFLOAT16_CAPABILITY, fast_precision

log = logging.getLogger(__name__)


def prepare(config: Config, device: torch.device) -> None:
    """Make the settings of this process that decide how its numbers are computed, to the bit.

    Raises:
        UserError: the GPU cannot compute in ``train.precision``.
    """
    if device.type == "cpu":
        if config.train.precision == "bfloat16" and fast_precision() == "float32" and parallel.rank() == 0:
            log.warning(
                "train.precision: bfloat16, but this processor is not known to multiply in it and may take many times"
                " as long as in float32; for a new run set train.precision=float32"
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun and by Ray Train
        torch.set_num_threads(config.train.threads or max(Groups().usable_cores() // here, 1))
    else:
        torch.cuda.set_device(device)
        capability = torch.cuda.get_device_capability(device)
        if config.train.precision == "bfloat16" and capability < BFLOAT16_CAPABILITY:
            raise UserError(
                f"train.precision: bfloat16, but {torch.cuda.get_device_name(device)} is older than Ampere and has no"
                " kernels for it; for a new run set train.precision=float32"
            )
        # One kind of GPU, one choice of kernels: what a resumed run computes is what the first one computed.
        torch.backends.cudnn.deterministic = True


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The arithmetic of the networks within it: ``train.precision``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bfloat16")
