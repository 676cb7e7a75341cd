"""LPIPS: how different two pictures look (Zhang, Isola, Efros, Shechtman and Wang 2018, arXiv 1801.03924, equation 1).

Two pictures go through a network that was trained to classify; the maps of five of its layers are normalised over
their channels, and the squared differences are weighted by learned heads (version 0.1 of the authors' ``lpips``) and
averaged over places. As there, pictures are not resized: the authors' own were of 64x64. The smallest are 16x16 for
VGG16 and 31x31 for AlexNet.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import nn

from autopainter.models import vgg, weights

Net = Literal["vgg", "alex"]

_EPSILON = 1e-10  # beside the length of a vector of channels, as the authors' code


def _alexnet() -> nn.Sequential:
    """The convolutions of AlexNet (Krizhevsky 2014, arXiv 1404.5997), numbered as torchvision's ``features``."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


class _Trunk(NamedTuple):
    """A network without its classifier; its maps are taken after these of its layers."""

    layers: Callable[[], nn.Sequential]
    taps: dict[int, int]  # number of a layer: its channels
    published: str
    file: str
    sha256: str


_TRUNKS: dict[Net, _Trunk] = {
    "vgg": _Trunk(
        lambda: vgg.layers(13),
        {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        "vgg16",
        "vgg16-lpips.safetensors",
        "99bcb845e2d4fe8a9c59fdf60b5f23bd7304e2e95441709e1d9acb3859c11634",
    ),
    "alex": _Trunk(
        _alexnet,
        {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},  # relu1 to relu5
        "alexnet",
        "alexnet-lpips.safetensors",
        "940fd440f222631a1bf17dd643a66b969aff53a0d59ff85bbcb7b64f3c56bb10",
    ),
}
FILES = {trunk.file: trunk.sha256 for trunk in _TRUNKS.values()}
"""Names of the weights in their folder, with the sha256 of each."""


class LPIPS(nn.Module):
    """The distance of one network. Its weights are never trained."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        trunk = _TRUNKS[net]
        self.normalise = vgg.Normalise()
        self.features = trunk.layers()
        self.heads = nn.ParameterList(torch.zeros(channels) for channels in trunk.taps.values())
        self._taps = trunk.taps
        self.requires_grad_(False)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, H, W] RGB in [-1, 1] -> the maps of the five layers; the last of ``vgg`` is relu5_3, of 512 channels.

        Raises:
            RuntimeError: the pictures are too small.
        """
        values, found = self.normalise(images), []
        for number, layer in enumerate(self.features):
            values = layer(values)
            if number in self._taps:
                found.append(values)
        return found

    def distance(self, maps: list[torch.Tensor], others: list[torch.Tensor]) -> torch.Tensor:
        """Equation 1 on the ``maps`` of two batches: [B], 0 for equal pictures; smaller is more alike.

        The paper scales the channels by w before they are squared; a head holds w squared.
        """
        total = torch.zeros(len(maps[0]), device=maps[0].device)
        for one, other, head in zip(maps, others, self.heads, strict=True):
            difference = _unit(one).sub_(_unit(other)).square_()  # the first maps of a large picture fill memory
            total = total + torch.einsum("bchw,c->bhw", difference, head).mean(dim=(1, 2))
        return total

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Distances of two batches [B, 3, H, W] of RGB in [-1, 1]: [B]."""
        return self.distance(self.maps(images), self.maps(others))


def _unit(maps: torch.Tensor) -> torch.Tensor:
    return maps / (torch.linalg.vector_norm(maps, dim=1, keepdim=True) + _EPSILON)


def load(folder: str, field: str) -> dict[Net, LPIPS]:
    """Both networks from a folder, s3:// or https:// prefix that ``make`` wrote into.

    Args:
        field: what named the folder, for messages.

    Raises:
        UserError: a file is not there or not the expected one.
    """
    networks: dict[Net, LPIPS] = {}
    for net, trunk in _TRUNKS.items():
        networks[net] = LPIPS(net)
        uri = f"{folder.rstrip('/')}/{trunk.file}"
        weights.load(networks[net], uri, trunk.sha256, field, advice=advice(folder), what=f"LPIPS ({net})")
    return networks


def advice(folder: str) -> str:
    """How the weights come into a folder."""
    return f"make it with 'autopainter vgg --metrics-weights {folder}'"


def make(folder: str, source: weights.Source) -> bool:
    """Store the weights of both networks; False if they were there already, and nothing was asked of the source.

    Args:
        folder: folder or s3:// prefix; the names are those of ``FILES``.
        source: gives all weights of ``vgg16`` and ``alexnet``, with heads.

    Raises:
        UserError: the source cannot be had or is not the expected one.
    """

    def published(trunk: _Trunk) -> weights.Weights:
        return dict(source()[trunk.published])

    made = [
        weights.keep(f"{folder.rstrip('/')}/{trunk.file}", trunk.sha256, functools.partial(published, trunk))
        for trunk in _TRUNKS.values()
    ]
    return any(made)
