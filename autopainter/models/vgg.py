"""VGG16's first layers (Simonyan and Zisserman 2014), the phi of the feature loss."""

import torch
from torch import nn

from autopainter.config import FeatureLayer
from autopainter.models import weights

_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: 2x2 max pooling
_CONVOLUTIONS: dict[FeatureLayer, int] = {"relu2_2": 4, "relu3_2": 6, "relu4_3": 10}
_SHA256: dict[FeatureLayer, str] = {
    "relu2_2": "74d7623e5eb17ea13cf0f5afc6524dc036275572b7f27e11fd820fc4af45910e",
    "relu3_2": "81196a1d029c2fb1a9ab0f8f0f36a5ab06f5e465e5a05d9fd44bfd21ab9edee8",
    "relu4_3": "e2a774c635b847821d0d9eb49452fcd7dcbda74ddc55727905aa6fed1846d8ac",
}


def layers(convolutions: int) -> nn.Sequential:
    """VGG16 up to the rectifier of its n-th convolution, of 13, numbered as torchvision's ``features``."""
    sequence = nn.Sequential()
    inputs, done = 3, 0
    for width in _WIDTHS:
        if done == convolutions:
            break
        if width:
            sequence.extend([nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()])
            inputs, done = width, done + 1
        else:
            sequence.append(nn.MaxPool2d(2))
    return sequence


class Normalise(nn.Module):
    """RGB in [-1, 1] to what networks trained on ImageNet take: [0, 1], less its mean, over its deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, 3, H, W]."""
        return ((images + 1) / 2 - self.mean) / self.std


class VGGFeatures(nn.Module):
    """phi: RGB in [-1, 1] to the feature maps of one VGG16 layer. Its weights are never trained."""

    def __init__(self, layer: FeatureLayer) -> None:
        super().__init__()
        self.normalise = Normalise()
        self.features = layers(_CONVOLUTIONS[layer])
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] RGB in [-1, 1] -> the layer's maps, e.g. [B, 128, H/2, W/2] for relu2_2."""
        maps: torch.Tensor = self.features(self.normalise(images))
        return maps


def load(uri: str, layer: FeatureLayer, sha256: str | None) -> VGGFeatures:
    """Load phi from a path, s3:// or https://.

    Args:
        sha256: checksum that the file must have; none: the pinned one of the file that ``make`` writes.

    Raises:
        UserError: there is no such file, or it is not the expected one.
    """
    network = VGGFeatures(layer)
    weights.load(
        network, uri, sha256 or _SHA256[layer], "loss.vgg_weights",
        advice="make it with 'autopainter vgg'", what=f"VGG16 up to {layer}",
    )  # fmt: skip
    return network


def make(destination: str, layer: FeatureLayer, source: weights.Source) -> bool:
    """Store phi's weights; False if they were there already, and nothing was asked of the source.

    Args:
        destination: path or s3:// URI of the safetensors file.
        source: gives all weights of ``vgg16``.

    Raises:
        UserError: the source cannot be had or is not the expected one.
    """
    wanted = VGGFeatures(layer).state_dict()

    def cut() -> weights.Weights:
        published = source()["vgg16"]
        return {parameter: published[parameter] for parameter in wanted}

    return weights.keep(destination, _SHA256[layer], cut)
