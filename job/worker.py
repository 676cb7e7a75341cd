"""What one Ray Train worker runs."""

import logging
from typing import Any

import ray.train.torch
import ray.train.v2._internal.execution.context as train_context
import torch
import torch.distributed as dist

from autopainter import loop
from autopainter.config import Config
from job.host import RayHost
from job.logs import log_as


def train_worker(parameters: dict[str, Any]) -> str:
    """Train as one worker of the group.

    Which worker reports and saves, and where the run continues, is the library's business: Ray has only started the
    process and its torch.distributed group.

    Args:
        parameters: ``config``, a dumped ``Config``; ``link``, the driver's ``DriverLink``; ``log_format``, as
            ``autopainter.logs.setup`` takes it.

    Returns:
        Why it ended, as ``loop.Ended.why``.
    """
    for noisy in ("botocore", train_context.__file__):  # Ray shows the root logger's INFO
        logging.getLogger(noisy).setLevel(logging.WARNING)
    log_as(parameters["log_format"])
    config = Config.model_validate(parameters["config"])
    device: torch.device = ray.train.torch.get_device()
    ended = loop.train(config, device, RayHost(parameters["link"]))
    if dist.is_initialized():
        dist.destroy_process_group()
    return ended.why
