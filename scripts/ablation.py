"""What does each term of the objective do? Trains the same generator with more and more of them, and compares.

Same data, seed and steps; each run in one process, on the GPU if there is one. It writes table.md and sheet.png into
the folder; the same command again continues where it was interrupted. On two cores the default takes hours: two calls
beside each other with other --variants and --set train.threads=1 are sooner done; a last one for all then makes the
table.

    bash scripts/quickstart.sh --stop   # makes the environment
    .venv/bin/python scripts/ablation.py
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from measuring import cpu
from numpy.typing import NDArray

from autopainter.data import manifest as manifests
from autopainter.data import pictures
from autopainter.data.stream import validation_batches
from autopainter.paint import Painter
from autopainter.processor import fast_precision
from autopainter.sheet import grid, hints_on_sketch, picture

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "job/configs/quickstart.yaml"
OBJECTIVE = ["loss.tv_of=error", "loss.tv_weight=200", "loss.tv_growth=12.5"]
"""What leaves the fewest blotches in a run of this length (docs/quality.md, "Blotches")."""
_NO_HINTS = {"hints.unhinted": "1"}
_NO_TV = {"loss.tv_weight": "0"}
_NO_FEATURES = {"loss.feature_weight": "0"}
_NO_GAN = {"loss.adversarial_weight": "0"}
VARIANTS: dict[str, dict[str, str]] = {
    "L1": _NO_HINTS | _NO_TV | _NO_FEATURES | _NO_GAN,
    "+ GAN": _NO_HINTS | _NO_TV | _NO_FEATURES,
    "+ features": _NO_HINTS | _NO_TV,
    "+ TV": _NO_HINTS,
    "+ hints": {},
    "resize": {"model.upsampling": "resize"},
}
"""What each run changes of the configuration; `resize` is `+ hints` with the other decoder."""
COLUMNS = {
    "psnr": "PSNR, dB", "ssim": "SSIM", "lpips_vgg": "LPIPS-VGG", "lpips_alex": "LPIPS-Alex", "fd_vgg": "FD-VGG",
    "hint_error": "hint error", "checkerboard": "checkerboard", "blotches": "blotches",
}  # fmt: skip
TILE = 96
FLAT, WHITE = 4, 250
"""Levels of a flat part of a target differ by no more, and from the second one on it is paper."""
AREA_PIXELS = 20
"""Smaller areas have no blotches."""


def main() -> int:
    """Train, evaluate, write the table and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="Edge of the images in pixels, a multiple of 32.")
    parser.add_argument("--steps", type=int, default=10_000, help="Training steps of each run.")
    parser.add_argument("--folder", type=Path, default=Path(".ablation"), help="Where everything is kept.")
    parser.add_argument("--manifest", help="Another data set than OpenMoji: path or s3:// URI of its manifest.")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="Runs; all if not given."
    )
    parser.add_argument("--samples", type=int, default=12, help="Rows of the sheet.")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="For all runs, as in training."
    )
    options = parser.parse_args()
    folder = options.folder.absolute()
    weights = folder / "weights/vgg16-relu2_2.safetensors"
    manifest = options.manifest or str(folder / f"openmoji-{options.size * 3 // 2}/manifest.json")
    if not options.manifest:
        autopainter("pack", "openmoji", Path(manifest).parent, "--size", options.size * 3 // 2)
    autopainter("vgg", "--output", weights, "--metrics-weights", weights.parent)
    settings = [
        f"run.storage={folder / 'runs'}", f"data.manifest={manifest}", f"data.image_size={options.size}",
        f"loss.vgg_weights={weights}", f"train.steps={options.steps}", "checkpoint.keep_best=0",
        f"train.precision={'bfloat16' if torch.cuda.is_available() else fast_precision()}",
        f"train.decay_from={options.steps // 2}", *OBJECTIVE, *options.set,
    ]  # fmt: skip
    scores, painters = {}, {}
    for name in options.variants:
        run = folder / "runs" / f"{name.removeprefix('+ ').lower()}-{options.size}-{options.steps}"
        own = [f"run.name={run.name}", *(f"{field}={value}" for field, value in VARIANTS[name].items())]
        autopainter("train", "--config", CONFIG, *(part for text in settings + own for part in ("--set", text)))
        scores[name] = json.loads(autopainter("evaluate", "--run", run, "--json", capture=True))
        painters[name] = Painter.load(str(run))
        for hinted in [False, True][: 1 + takes_hints(name)]:
            row = scores[name]["scores"]["painted with hints" if hinted else "painted"]
            row |= defects(painters[name], hinted)
    table = report(scores)
    (folder / "table.md").write_text(table, encoding="utf-8")
    pictures.write_png(folder / "sheet.png", sheet(painters, options.samples))
    print(f"{table}\n{folder}/table.md\n{folder}/sheet.png")
    return 0


def autopainter(*arguments: object, capture: bool = False) -> str:
    """Run a command of the project; its output if that is captured."""
    command = [str(Path(sys.executable).parent / "autopainter"), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        print(f"ablation: 'autopainter {arguments[0]}' ended with exit code {done.returncode}", file=sys.stderr)
        sys.exit(done.returncode)
    return done.stdout or ""


def takes_hints(variant: str) -> bool:
    """Whether a variant has seen hints in its training."""
    return not VARIANTS[variant].keys() & _NO_HINTS.keys()


def sheet(painters: dict[str, Painter], samples: int) -> NDArray[np.uint8]:
    """One row a held-out sketch: what each run paints without hints, then what those that take hints make of them."""
    config = next(iter(painters.values())).config
    manifest = manifests.load(config.data.manifest)
    hinted = [name for name in painters if takes_hints(name)]
    rows: list[list[NDArray[np.uint8]]] = []
    seen = set[bytes]()
    for batch in validation_batches(manifest, config, 16):
        for row in range(len(batch.keys)):
            sketch, hint = batch.sketch[row : row + 1], batch.hint[row : row + 1]
            key = sketch.numpy().tobytes()
            if key in seen or len(rows) == samples or not hint[:, 3].any():
                continue
            seen.add(key)
            plain = [picture(painter.batch(sketch, torch.zeros_like(hint))[0]) for painter in painters.values()]
            steered = [picture(painters[name].batch(sketch, hint)[0]) for name in hinted]
            hints = hints_on_sketch(sketch[0], hint[0])
            rows.append([picture(sketch[0]), *plain, hints, *steered, picture(batch.color[row])])
    return grid(["sketch", *painters, "the hints", *hinted, "target"], rows, tile=TILE)


def defects(painter: Painter, hinted: bool) -> dict[str, float]:
    """What a run leaves where the target is flat, in grey levels of 255, over the held-out drawings.

    Returns:
        ``checkerboard``: standard deviation of what is painted at periods of 2 and 4 pixels in blocks of one colour,
        where transposed convolutions of stride 2 leave such patterns. ``blotches``: standard deviation of the colours
        inside an area of one colour, the mean over all such pixels. Paper does not count.
    """
    config, fine, blotches = painter.config, [], []
    for batch in validation_batches(manifests.load(config.data.manifest), config, 16):
        painted = painter.batch(batch.sketch, batch.hint * hinted)
        fine.append(fine_power(painted, batch.color))
        for image, target in zip(painted.numpy(), batch.color.numpy(), strict=True):
            blotches += [(area.var(axis=1).mean(), area.shape[1]) for area in flat_areas(image, target)]
    variances, weights = np.array(blotches).T
    return {
        "checkerboard": float(torch.cat(fine).mean().sqrt()),
        "blotches": float(np.average(np.sqrt(variances), weights=weights)),
    }


def fine_power(painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Power at periods of 2 and 4 pixels, in each block of 8 x 8 pixels that is flat in the target: float32 [N]."""
    painted, target = (
        images.float().mean(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).reshape(-1, 8, 8) for images in (painted, target)
    )
    flat = (target.amax(dim=(1, 2)) - target.amin(dim=(1, 2)) <= FLAT) & (target.amin(dim=(1, 2)) < WHITE)
    power = torch.fft.fft2(painted[flat], norm="forward").abs().square()
    periods = [2, 4, 6]  # of 8 frequencies: 2 and 6 have a period of 4 pixels, 4 has one of 2
    both = power[:, periods][:, :, periods].sum(dim=(1, 2))
    return power[:, periods].sum(dim=(1, 2)) + power[:, :, periods].sum(dim=(1, 2)) - both


def flat_areas(painted: NDArray[np.uint8], target: NDArray[np.uint8]) -> Iterator[NDArray[np.float64]]:
    """What is painted in each area that has one colour in the target: [3, pixels] for uint8 [3, H, W]."""
    spread = [cv2.morphologyEx(channel, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) for channel in target]
    inside = (np.max(spread, axis=0) <= FLAT) & (target.min(axis=0) < WHITE)
    count, labels = cv2.connectedComponents(inside.astype(np.uint8), connectivity=4)
    for label in range(1, count):
        area = labels == label
        if area.sum() >= AREA_PIXELS:
            yield painted[:, area].astype(np.float64)


def report(scores: dict[str, Any]) -> str:
    """The table in Markdown."""
    first = next(iter(scores.values()))
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()
    lines = [
        f"{first['images']} held-out pictures, {first['image_size']} px, {first['step']} steps each; {machine}\n",
        f"| run | hints | {' | '.join(COLUMNS.values())} |",
        f"| --- | --- |{' ---: |' * len(COLUMNS)}",
    ]

    def line(name: str, hints: str, values: dict[str, float]) -> str:
        cells = [f"{values[column]:.3f}" if column in values else "" for column in COLUMNS]
        return f"| {name} | {hints} | {' | '.join(cells)} |"

    lines += [line(name, "without", first["scores"][name]) for name in ("sketch", "mean colour")]
    for name, score in scores.items():
        lines.append(line(name, "without", score["scores"]["painted"]))
        if takes_hints(name):
            lines.append(line(name, "with", score["scores"]["painted with hints"]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
