"""A run scored on its whole validation split, without and with hints, beside two ways to paint without a network."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from autopainter import storage
from autopainter.config import Config
from autopainter.data import manifest as manifests
from autopainter.data.manifest import Manifest
from autopainter.data.pictures import Image
from autopainter.data.stream import Batch, validation_batches
from autopainter.errors import UserError
from autopainter.evaluate.metrics import PERCEPTUAL, Row, Target
from autopainter.evaluate.score import paint_both
from autopainter.models import lpips
from autopainter.paint import Painter, Step
from autopainter.sheet import contact_sheet
from autopainter.uri import split

_BATCH = 16
_BATCH_PIXELS = 1 << 19  # what the metrics of so many pixels take on a CPU: 0.8 GB
_SHEET_COLUMNS = 2
_SHEET_TILE = 96

ROWS = ("sketch", "mean colour", "painted", "painted with hints")
"""The bare lines; each picture flat in the mean colour of these targets (of all flat colours the one with the least
squared error: what is no better has learned nothing from the sketch); the run without and with hints."""

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
        scores: by the names of ``ROWS``, then by those of ``metrics.COLUMNS``.
        absent: why there is no such metric, by name.
        sheet: contact sheet of the samples that were asked for, uint8 [H, W, 3] RGB.
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
    sheet: Image | None = field(default=None, compare=False, repr=False)


def evaluate_run(
    run_uri: str,
    step: Step | None,
    *,
    weights: str | None = None,
    limit: int | None = None,
    samples: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Score a run on its validation split, on a GPU where there is one.

    Args:
        run_uri: folder or s3:// URI of the run.
        step: as ``Painter.load`` takes it.
        weights: folder or s3:// prefix of the weights of ``models.lpips``; none: the folder of the run's
            ``loss.vgg_weights``, if they are there.
        limit: score the first so many images; none: all of them.
        samples: samples in the contact sheet: the first of the split whose sketches differ; 0: no sheet.
        progress: is told what is done, how many images of how many.

    Raises:
        UserError: there is no such run, step or data set, it is another data set than the run was trained on, its
            validation split is empty, or the weights are not the expected ones.
        CorruptData, StorageError: something is damaged, or storage kept failing.
    """
    painter = Painter.load(run_uri, step)
    config, manifest = painter.config, _manifest(painter, run_uri)
    images = sum(len(shard.samples) for shard in manifest.split("validation"))
    images = images if limit is None else min(images, limit)
    networks, absent = _networks(weights, config)
    for network in networks.values():
        network.to(painter.device)
    rows = {name: Row(networks) for name in ROWS}
    gallery = _Gallery(samples)
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    done = 0
    with torch.no_grad(), exact:
        for batch, paintings in _paintings(painter, manifest, limit):
            target = Target(batch, networks)
            for row, painted in zip(rows.values(), paintings, strict=True):
                row.add(painted, target)
            gallery.add(batch, *paintings[2:])
            done += len(batch.keys)
            progress("evaluated", done, images)
    if networks and images < 2:
        absent["fd_vgg"] = "one image has no covariance; at least two are needed"
    hinted_images = rows["sketch"].hinted_images
    if not hinted_images:
        absent["hint_error"] = "none of the images has hints"
    return Evaluation(
        run=run_uri, step=painter.step, manifest=config.data.manifest, manifest_id=manifest.id,
        image_size=config.data.image_size, images=images, hinted_images=hinted_images,
        weights=dict(lpips.FILES) if networks else {}, scores={name: row.values() for name, row in rows.items()},
        absent=absent, sheet=gallery.sheet() if samples else None,
    )  # fmt: skip


def _manifest(painter: Painter, run_uri: str) -> Manifest:
    """The data set that a run was trained on; ``UserError`` if another one has taken its place."""
    uri = painter.config.data.manifest
    manifest = manifests.load(uri)
    advice = ", which may have seen what is held out there; bring that one back"
    manifests.check_trained_on(manifest, uri, run_uri, painter.manifest_id, advice)
    return manifest


def _paintings(
    painter: Painter, manifest: Manifest, limit: int | None
) -> Iterator[tuple[Batch, tuple[torch.Tensor, ...]]]:
    """The validation batches on the device, each with its paintings of ``ROWS``, uint8 [B, 3, S, S]."""
    size = max(min(_BATCH, _BATCH_PIXELS // painter.config.data.image_size**2), 1)
    flat = _mean_color(validation_batches(manifest, painter.config, size, limit)).to(painter.device)
    for batch in validation_batches(manifest, painter.config, size, limit):
        batch = batch.to(painter.device)
        plain, hinted = paint_both(painter.batch, batch)
        yield batch, (batch.sketch.expand_as(batch.color), flat.expand_as(batch.color), plain, hinted)


def _mean_color(batches: Iterable[Batch]) -> torch.Tensor:
    """Mean colour of the targets: uint8 [1, 3, 1, 1]."""
    total, pixels = torch.zeros(3, dtype=torch.int64), 0
    for batch in batches:
        total += batch.color.sum(dim=(0, 2, 3))
        pixels += batch.color[:, 0].numel()
    return (total.double() / pixels).round().to(torch.uint8).view(1, 3, 1, 1)


def _networks(folder: str | None, config: Config) -> tuple[Mapping[lpips.Net, lpips.LPIPS], dict[str, str]]:
    """The networks of LPIPS, or why there are none, by the names of the metrics."""
    if folder is not None:
        return lpips.load(folder, "--metrics-weights"), {}
    if not config.loss.vgg_weights:
        return {}, dict.fromkeys(PERCEPTUAL, f"--metrics-weights FOLDER is needed; {lpips.advice('FOLDER')}")
    folder = split(config.loss.vgg_weights)[0]
    try:
        store = storage.open_store(folder)
        missing = [name for name in lpips.FILES if store.size(name) is None]
    except (OSError, UserError) as error:  # a run can be scored without what nobody asked for
        return {}, dict.fromkeys(PERCEPTUAL, f"{error}; --metrics-weights names another folder")
    if missing:
        reason = f"{store.locate(missing[0])}: not found; {lpips.advice(folder)}"
        return {}, dict.fromkeys(PERCEPTUAL, reason)
    return lpips.load(folder, "--metrics-weights"), {}


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

    def sheet(self) -> Image:
        columns = _SHEET_COLUMNS if len(self._picked) > 1 else 1
        return contact_sheet(self._picked.values(), columns=columns, tile=_SHEET_TILE)
