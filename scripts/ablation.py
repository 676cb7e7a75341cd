"""What does each term of the objective do? Trains the same generator with more and more of them, and compares.

Same data (OpenMoji), seed and steps; one process, on the GPU if there is one. It writes table.md and sheet.png into
the folder; the same command again continues where it was interrupted.

    bash scripts/quickstart.sh --stop   # makes the environment
    .venv/bin/python scripts/ablation.py
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import cpu

from autopainter import config as configuration
from autopainter.data import manifest as manifests
from autopainter.data import pictures
from autopainter.data.stream import validation_batches
from autopainter.paint import Painter
from autopainter.sheet import grid, hints_on_sketch, picture

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "job/configs/quickstart.yaml"
NO_HINTS = {"hints.unhinted": "1"}
ONLY_L1 = {"loss.adversarial_weight": "0", "loss.feature_weight": "0", "loss.tv_weight": "0"}
VARIANTS: dict[str, dict[str, str]] = {
    "L1": NO_HINTS | ONLY_L1,
    "+ GAN": NO_HINTS | {"loss.feature_weight": "0", "loss.tv_weight": "0"},
    "+ features": NO_HINTS | {"loss.tv_weight": "0"},
    "+ TV": NO_HINTS,
    "+ hints": {},
    "resize": {"model.upsampling": "resize"},
}
"""What each run changes of the configuration; ``resize`` is ``+ hints`` with the other decoder."""
TILE = 96


def main() -> int:
    """Train, evaluate, write the table and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="Edge of the images in pixels, a multiple of 32.")
    parser.add_argument("--steps", type=int, default=3000, help="Training steps of each run.")
    parser.add_argument("--folder", type=Path, default=Path(".ablation"), help="Where everything is kept.")
    parser.add_argument("--samples", type=int, default=12, help="Rows of the sheet.")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="For all runs, as in training."
    )
    options = parser.parse_args()
    folder = options.folder.absolute()
    data, weights = folder / f"openmoji-{options.size * 3 // 2}", folder / "weights"
    autopainter("pack", "openmoji", data, "--size", options.size * 3 // 2)
    autopainter("vgg", "--output", weights / "vgg16-relu2_2.safetensors")
    autopainter("vgg", "--metrics", "--output", weights)
    settings = [
        f"run.storage={folder / 'runs'}", f"data.manifest={data / 'manifest.json'}", f"data.image_size={options.size}",
        f"loss.vgg_weights={weights / 'vgg16-relu2_2.safetensors'}", f"train.steps={options.steps}",
        "train.precision=float32", "checkpoint.keep_best=0", *options.set,
    ]  # fmt: skip
    seconds, scores = {}, {}
    for name, changes in VARIANTS.items():
        run = folder / "runs" / run_name(name, options)
        own = [f"run.name={run.name}", *(f"{field}={value}" for field, value in changes.items())]
        began = time.monotonic()
        autopainter("train", "--config", CONFIG, *(part for text in settings + own for part in ("--set", text)))
        seconds[name] = time.monotonic() - began
        document = autopainter("evaluate", "--run", run, "--metrics-weights", weights, "--json", capture=True)
        scores[name] = json.loads(document)
    painters = {name: Painter.load(str(folder / "runs" / run_name(name, options))) for name in VARIANTS}
    table = report(scores, seconds, options, painters["+ hints"].config)
    (folder / "table.md").write_text(table, encoding="utf-8")
    pictures.write_png(folder / "sheet.png", sheet(painters, options.samples))
    print(table)
    print(f"{folder}/table.md\n{folder}/sheet.png")
    return 0


def run_name(variant: str, options: argparse.Namespace) -> str:
    """Name of a variant's run."""
    return f"{variant.replace('+ ', '').lower()}-{options.size}-{options.steps}"


def autopainter(*arguments: object, capture: bool = False) -> str:
    """Run a command of the project; its output if that is captured."""
    command = [str(Path(sys.executable).parent / "autopainter"), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        print(f"ablation: 'autopainter {arguments[0]}' ended with exit code {done.returncode}", file=sys.stderr)
        sys.exit(done.returncode)
    return done.stdout or ""


def sheet(painters: dict[str, Painter], samples: int) -> pictures.Image:
    """One row a held-out sketch: what each run paints without hints, and the last ones with them."""
    config = painters["+ hints"].config
    manifest = manifests.load(config.data.manifest)
    rows, seen = [], set[bytes]()
    for batch in validation_batches(manifest, config, 16):
        plain = {name: painter.batch(batch.sketch, torch.zeros_like(batch.hint)) for name, painter in painters.items()}
        hinted = {name: painters[name].batch(batch.sketch, batch.hint) for name in ("+ hints", "resize")}
        for row in range(len(batch.keys)):
            key = batch.sketch[row].numpy().tobytes()
            if key in seen or len(rows) == samples or not batch.hint[row, 3].any():
                continue
            seen.add(key)
            rows.append([
                picture(batch.sketch[row]), *(picture(painted[row]) for painted in plain.values()),
                hints_on_sketch(batch.sketch[row], batch.hint[row]), *(picture(painted[row]) for painted in hinted.values()),
                picture(batch.color[row]),
            ])  # fmt: skip
    headings = ["sketch", *painters, "the hints", "+ hints", "resize", "target"]
    return grid(headings, rows, tile=TILE)


def report(
    scores: dict[str, Any], seconds: dict[str, float], options: argparse.Namespace, config: configuration.Config
) -> str:
    """The table in Markdown."""
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(main())
