"""What one Ray Train worker runs."""

import logging
from typing import Any

import ray.train.torch
import torch

from autopainter import loop
from autopainter.config import Config


def train_worker(parameters: dict[str, Any]) -> None:
    """Train as one worker of the group; ``parameters`` is a dumped ``Config``.

    Which worker reports and saves, and where the run continues, is the library's business: Ray has only started the
    process and its torch.distributed group.
    """
    logging.getLogger("botocore").setLevel(logging.WARNING)  # Ray shows the root logger's INFO
    config = Config.model_validate(parameters)
    device: torch.device = ray.train.torch.get_device()
    loop.train(config, device)
