"""The metrics of an evaluation, gathered batch by batch in memory that does not grow with the number of images."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from autopainter.data.stream import Batch
from autopainter.evaluate.score import Score
from autopainter.models.lpips import LPIPS, Net
from autopainter.pixels import to_unit

_SSIM_SIGMA = 1.5
_SSIM_MARGIN = 5  # half of the 11x11 window


class Column(NamedTuple):
    """A metric in the table and in words."""

    title: str
    digits: int
    unit: str


COLUMNS = {
    "psnr": Column("PSNR dB", 2, "peak signal-to-noise ratio in dB; mean over images; higher is better"),
    "ssim": Column("SSIM", 3, "structural similarity, at most 1; mean over images; higher is better"),
    "lpips_vgg": Column("LPIPS-VGG", 3, "LPIPS 0.1 on VGG16, from 0; mean over images; lower is better"),
    "lpips_alex": Column("LPIPS-Alex", 3, "LPIPS 0.1 on AlexNet, from 0; mean over images; lower is better"),
    "fd_vgg": Column("FD-VGG", 2, "Frechet distance of mean VGG16 relu5_3 features, from 0; lower is better"),
    "error": Column("error", 2, "mean absolute RGB difference to the target, in [0, 255]; lower is better"),
    "hint_error": Column("hint error", 2, "mean absolute RGB difference to the hints, inside them, in [0, 255];"
                         " mean over images with hints; lower is better"),
}  # fmt: skip
"""The metrics, in the order of the table."""
PERCEPTUAL = ("lpips_vgg", "lpips_alex", "fd_vgg")
"""The metrics that need the weights of ``models.lpips``."""


class Mean:
    """A mean of numbers that come in batches."""

    def __init__(self) -> None:
        self._sum, self.count = 0.0, 0

    def add(self, values: torch.Tensor) -> None:
        """Take in [B] numbers."""
        self._sum += values.double().sum().item()
        self.count += len(values)

    @property
    def value(self) -> float | None:
        """The mean; none of no numbers."""
        return self._sum / self.count if self.count else None


class FrechetVGG:
    """Frechet distance between two sets of pictures, by the mean over places of their VGG16 relu5_3 maps.

    The formula is that of the Frechet inception distance (Heusel et al. 2017, arXiv 1706.08500, equation 6) on 512
    features of another network, so its numbers are no FID. Means and covariances are streaming sums in float64; the
    trace of the root of the product of the covariances comes from its eigenvalues. With few pictures it is biased
    upwards, so only distances over equal numbers of pictures can be compared.
    """

    def __init__(self) -> None:
        self._distance = FrechetInceptionDistance(feature=_Features())
        self.images = 0

    def add(self, painted: torch.Tensor, target: torch.Tensor) -> None:
        """Take in the maps of a batch, both float [B, 512, H, W]."""
        for maps, real in ((painted, False), (target, True)):
            self._distance.update(maps.double().mean(dim=(2, 3)).cpu(), real=real)
        self.images += len(painted)

    @property
    def value(self) -> float | None:
        """The distance, from 0; none for fewer than two pictures, which have no covariance."""
        return max(self._distance.compute().item(), 0.0) if self.images > 1 else None  # rounding may give -1e-6


class _Features(nn.Identity):
    num_features = 512


def ssim(painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004, equation 13, K1 = 0.01, K2 = 0.03).

    Windows are Gaussian, 11x11, sigma 1.5, and lie wholly inside the picture, as in the authors' code. Theirs was for
    grey pictures: here it is the mean over R, G and B. In float32 flat areas come out up to 4e-4 off; in float64 a
    picture of 512x512 would take 1.3 GB on a CPU and ten times as long.

    Args:
        painted, target: uint8 [B, 3, H, W] of at least 11x11 pixels.

    Returns:
        float32 [B], at most 1.
    """
    _, places = structural_similarity_index_measure(
        painted.float(), target.float(), sigma=_SSIM_SIGMA, data_range=255.0, reduction="none", return_full_image=True
    )
    inside = slice(_SSIM_MARGIN, -_SSIM_MARGIN)  # the library mirrors the edges to fill the windows beyond them
    return places[..., inside, inside].mean(dim=(1, 2, 3))


def hint_error(painted: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
    """Mean absolute RGB difference, in [0, 255], between painting and hints inside the mask of the hints.

    Args:
        painted: uint8 [B, 3, H, W].
        hint: uint8 [B, 4, H, W], RGB and a 0/1 mask.

    Returns:
        float64 [images that have hints].
    """
    mask = hint[:, 3:].double()
    pixels = mask.sum(dim=(1, 2, 3))
    difference = (painted.double() - hint[:, :3].double()).abs() * mask
    return difference.sum(dim=(1, 2, 3))[pixels > 0] / (3 * pixels[pixels > 0])


class Target:
    """What a batch is compared with; its maps are computed once for all rows."""

    def __init__(self, batch: Batch, networks: Mapping[Net, LPIPS]) -> None:
        self.color, self.hint = batch.color, batch.hint
        self.maps = {net: network.maps(to_unit(batch.color)) for net, network in networks.items()}


class Row:
    """The metrics of one way to paint.

    Args:
        networks: those of LPIPS; without them there is no LPIPS and no FD-VGG.
    """

    def __init__(self, networks: Mapping[Net, LPIPS]) -> None:
        self._networks = networks
        self._score = Score()
        self._ssim, self._hint_error = Mean(), Mean()
        self._lpips = {net: Mean() for net in networks}
        self._frechet = FrechetVGG()

    def add(self, painted: torch.Tensor, target: Target) -> None:
        """Take in a batch of paintings, uint8 [B, 3, H, W]."""
        self._score.add(painted, target.color)
        self._ssim.add(ssim(painted, target.color))
        self._hint_error.add(hint_error(painted, target.hint))
        for net, network in self._networks.items():
            maps = network.maps(to_unit(painted))
            self._lpips[net].add(network.distance(maps, target.maps[net]))
            if net == "vgg":
                self._frechet.add(maps[-1], target.maps[net][-1])

    @property
    def hinted_images(self) -> int:
        """Images that have hints."""
        return self._hint_error.count

    def values(self) -> dict[str, float]:
        """The metrics that there are, by the names and in the order of ``COLUMNS``."""
        found = {
            "psnr": self._score.psnr,
            "ssim": self._ssim.value,
            **{f"lpips_{net}": mean.value for net, mean in self._lpips.items()},
            "fd_vgg": self._frechet.value,
            "error": self._score.error,
            "hint_error": self._hint_error.value,
        }
        return {name: value for name, value in found.items() if value is not None}
