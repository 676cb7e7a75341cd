"""A run scored on its whole validation split, without and with hints, beside two ways to paint without a network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from autopainter import storage
from autopainter.config import Config
from autopainter.data import manifest as manifests
from autopainter.data import pictures
from autopainter.data.manifest import Manifest
from autopainter.data.stream import Batch, validation_batches
from autopainter.errors import UserError
from autopainter.evaluate.metrics import PERCEPTUAL, Row, Target
from autopainter.evaluate.score import paint_both
from autopainter.models import lpips
from autopainter.paint import Painter
from autopainter.sheet import contact_sheet
from autopainter.uri import split

_BATCH = 16
_BATCH_PIXELS = 1 << 19  # VGG16's maps of so many pixels take 0.3 GB
_SHEET_COLUMNS = 2
_SHEET_TILE = 96

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to.

    Attributes:
        run: its folder or s3:// URI.
        step: the checkpoint.
        manifest, manifest_id: the data set, by URI and sha256.
        image_size: edge of the pictures in pixels.
        images: how many of the validation split, and ``hinted_images`` how many of them have hints.
        weights: sha256 of the files that LPIPS and FD-VGG come from; empty without them.
        scores: by row, then by the names of ``metrics.COLUMNS``. The rows are ``sketch`` (the bare lines),
            ``mean colour`` (each picture flat in the mean colour of these targets: of all flat colours the one with the
            least squared error), ``painted`` and ``painted with hints``.
        absent: why there is no such metric, by name.
    """

    run: str
    step: int
    manifest: str
    manifest_id: str
    image_size: int
    images: int
    hinted_images: int
    weights: dict[str, str]
    scores: dict[str, dict[str, float]]
    absent: dict[str, str]


def evaluate_run(
    run_uri: str,
    step: int | None,
    *,
    weights: str | None = None,
    limit: int | None = None,
    sheet: Path | None = None,
    samples: int = 24,
    progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Score a run on its validation split, on a GPU where there is one.

    Args:
        run_uri: folder or s3:// URI of the run.
        step: a saved step; none: the newest.
        weights: folder or s3:// prefix of the weights of ``models.lpips``; none: the folder of the run's
            ``loss.vgg_weights``, if they are there.
        limit: score the first so many images; none: all of them.
        sheet: PNG file for a contact sheet.
        samples: samples in the sheet: the first of the split whose sketches differ.
        progress: is told what is done, how many images of how many.

    Raises:
        UserError: there is no such run, step or data set, it is another data set than the run was trained on, its
            validation split is empty, or the weights are not the expected ones.
        CorruptData, StorageError: something is damaged, or storage kept failing.
    """
    painter = Painter.load(run_uri, step)
    config, manifest = painter.config, manifests.load(painter.config.data.manifest)
    if manifest.id != painter.manifest_id:
        raise UserError(
            f"data.manifest: {config.data.manifest} is another data set (sha256 {manifest.id[:12]}) than the run"
            f" {run_uri} was trained on ({painter.manifest_id[:12]}): its validation split may hold what was trained on"
        )
    images = sum(len(shard.samples) for shard in manifest.split("validation"))
    images = images if limit is None else min(images, limit)
    networks, absent = _networks(weights, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for network in (painter.generator, *networks.values()):
        network.to(device)
    size = max(min(_BATCH, _BATCH_PIXELS // config.data.image_size**2), 1)
    rows = {name: Row(networks) for name in ("sketch", "mean colour", "painted", "painted with hints")}
    gallery = _Gallery(samples if sheet else 0)
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.no_grad(), exact:
        mean = _mean_color(manifest, config, size, limit)
        for batch in validation_batches(manifest, config, size, limit):
            batch = batch.to(device)
            plain, hinted = paint_both(painter.batch, batch)
            target = Target(batch, networks)
            flat = mean.to(device).expand_as(batch.color)
            for row, painted in zip(rows.values(), (batch.sketch.expand_as(batch.color), flat, plain, hinted),
                                    strict=True):  # fmt: skip
                row.add(painted, target)
            gallery.add(batch, plain, hinted)
            progress("evaluated", batch.step * size + len(batch.keys), images)
    if sheet:
        gallery.write(sheet)
    if networks and images < 2:
        absent["fd_vgg"] = "one image has no covariance; at least two are needed"
    hinted_images = rows["sketch"].hinted_images
    if not hinted_images:
        absent["hint_error"] = "none of the images has hints"
    return Evaluation(
        run=run_uri, step=painter.step, manifest=config.data.manifest, manifest_id=manifest.id,
        image_size=config.data.image_size, images=images, hinted_images=hinted_images,
        weights=dict(lpips.FILES) if networks else {}, scores={name: row.values() for name, row in rows.items()},
        absent=absent,
    )  # fmt: skip


def _networks(folder: str | None, config: Config) -> tuple[Mapping[lpips.Net, lpips.LPIPS], dict[str, str]]:
    """The networks of LPIPS, or why there are none, by the names of the metrics."""
    if folder:
        return lpips.load(folder, "--metrics-weights"), {}
    beside = config.loss.vgg_weights
    if not beside or beside.startswith("https://"):  # what nobody asked for is not downloaded
        return {}, dict.fromkeys(PERCEPTUAL, f"--metrics-weights FOLDER is needed; {lpips.advice('FOLDER')}")
    folder = split(beside)[0]
    try:
        store = storage.open_store(folder)
        missing = [name for name in lpips.FILES if store.size(name) is None]
    except (OSError, UserError) as error:  # a run can be scored without what nobody asked for
        return {}, dict.fromkeys(PERCEPTUAL, f"{error}; --metrics-weights names another folder")
    if missing:
        reason = f"{store.locate(missing[0])}: not found; {lpips.advice(folder)}"
        return {}, dict.fromkeys(PERCEPTUAL, reason)
    return lpips.load(folder, "--metrics-weights"), {}


def _mean_color(manifest: Manifest, config: Config, size: int, limit: int | None) -> torch.Tensor:
    """Mean colour of the targets: uint8 [1, 3, 1, 1]."""
    total, pixels = torch.zeros(3, dtype=torch.int64), 0
    for batch in validation_batches(manifest, config, size, limit):
        total += batch.color.sum(dim=(0, 2, 3))
        pixels += batch.color[:, 0].numel()
    return (total.double() / pixels).round().to(torch.uint8).view(1, 3, 1, 1)


class _Gallery:
    """The first samples whose sketches differ, for a contact sheet."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._picked: dict[bytes, tuple[Batch, torch.Tensor, torch.Tensor]] = {}

    def add(self, batch: Batch, plain: torch.Tensor, hinted: torch.Tensor) -> None:
        for row in range(len(batch.keys)):
            if len(self._picked) == self._samples:
                return
            part = batch.part(slice(row, row + 1)).to(torch.device("cpu"))
            painted = plain[row : row + 1].cpu(), hinted[row : row + 1].cpu()
            self._picked.setdefault(part.sketch.numpy().tobytes(), (part, *painted))

    def write(self, path: Path) -> None:
        columns = _SHEET_COLUMNS if len(self._picked) > 1 else 1
        pictures.write_png(path, contact_sheet(self._picked.values(), columns=columns, tile=_SHEET_TILE))
