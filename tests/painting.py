"""A small run with random weights to paint with, sketches, hints, and the command line in this process."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autopainter import checkpoint, storage
from autopainter import config as configuration
from autopainter.cli import cli, exit_code_of
from autopainter.config import Config
from autopainter.errors import UserError
from autopainter.models.unet import UNet
from autopainter.trainer import build_generator

Image = NDArray[np.uint8]


def small_config(*more: str) -> Config:
    """32 pixels, 5 levels, 4 channels."""
    texts = ["run.name=small", "run.storage=/tmp", "data.manifest=m", "train.steps=1", "loss.feature_weight=0",
             "data.image_size=32", "model.generator_width=4", "train.precision=float32", *more]  # fmt: skip
    return configuration.load(None, texts, {})


def save_run(
    folder: Path, config: Config, scores: Mapping[int, float | None], document: dict[str, Any] | None = None
) -> str:
    """A run with checkpoints of these steps and scores, whose weights differ; its URI.

    Args:
        document: the configuration that the checkpoints tell, if it is another one.
    """

    def painter(step: int) -> UNet:
        generator = build_generator(config)
        with torch.no_grad():  # far from the small weights of the start, so that pictures differ
            for number, parameter in enumerate(generator.parameters()):
                random = torch.Generator().manual_seed(1000 * step + number)
                parameter.copy_(torch.randn(parameter.shape, generator=random) * (0.2 if parameter.dim() > 1 else 1))
        return generator

    painters = [(step, painter(step), score) for step, score in scores.items()]
    return save_painters(folder, document or config.model_dump(mode="json"), painters)


def save_painters(
    folder: Path,
    document: dict[str, Any],
    painters: Iterable[tuple[int, UNet, float | None]],
    manifest_id: str = "0" * 64,
) -> str:
    """A run with checkpoints of these steps, generators and scores; its URI.

    Args:
        document: the configuration that the checkpoints tell.
        manifest_id: of the data set that they tell.
    """
    store = storage.open_store(str(folder))
    meta = {"manifest_id": manifest_id, "config": document}
    writer = checkpoint.CheckpointWriter(store, checkpoint.begin_attempt(store, {}), checkpoint.Retention(10), meta)
    for step, generator, score in painters:
        writer.save(step, {f"average.{name}": tensor for name, tensor in generator.state_dict().items()}, score)
        writer.wait()
    assert writer.error is None
    return store.uri


def damage(run: str, step: int) -> None:
    """Flip a bit of a checkpoint's weights."""
    store = storage.open_store(run)
    key = next(entry.key for entry in store.list(f"checkpoints/{step:08d}/") if "weights" in entry.key)
    data = bytearray(store.read(key))
    data[-1] ^= 1
    store.write(key, bytes(data))


def drawing(height: int, width: int, seed: int = 0) -> Image:
    """Dark lines on white, uint8 [H, W]."""
    random = np.random.default_rng(seed)
    sketch = np.full((height, width), 255, np.uint8)
    for _ in range(5):
        ends = random.integers(0, [width, height], (2, 2)).tolist()
        cv2.line(sketch, ends[0], ends[1], 0, 1)
    return sketch


def hinted(height: int, width: int, alpha: int = 255) -> Image:
    """A red patch with an alpha on a transparent picture that is green underneath: uint8 [H, W, 4] RGBA."""
    hints = np.zeros((height, width, 4), np.uint8)
    hints[..., 1] = 200
    hints[: height // 2, : width // 2] = (250, 10, 20, alpha)
    return hints


def refusal(action: Callable[[], object], *words: str) -> str:
    """The message, of one line and with these words, that an action is refused with."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def command(arguments: Iterable[object]) -> int:
    """Exit code of ``autopainter`` with these arguments, in this process."""
    return exit_code_of(lambda: cli.main([str(part) for part in arguments], standalone_mode=False), "autopainter")
