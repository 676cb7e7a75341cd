"""What are others' loss weights in our units? Measures, on a run's held-out pictures, their terms beside ours.

A weight w of a term that is not ours means about w * (their term / our term) for ours: the table in docs/training.md.

    .venv/bin/python scripts/loss_units.py --run s3://autopainter/runs/quickstart-64 --weights FOLDER
"""

import argparse
from pathlib import Path

import torch

from autopainter import losses
from autopainter.data import manifest as manifests
from autopainter.data.stream import validation_batches
from autopainter.models import vgg
from autopainter.paint import Painter
from autopainter.pixels import to_unit

PIXELS = 512 * 512 * 3  # of the pictures that the others' sums were taken over
CAFFE_SCALE = 255 * 0.226
"""Inputs of Caffe's VGG16 are in [0, 255], torchvision's are divided by about 0.226: features are so much larger."""


def main() -> None:
    """Print each ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="Folder or s3:// URI of a trained run.")
    parser.add_argument(
        "--weights", required=True, help="Folder or s3:// prefix of vgg16-relu2_2 and -relu3_2.safetensors."
    )
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    painter = Painter.load(options.run)
    manifest = manifests.load(painter.config.data.manifest)
    (batch,) = validation_batches(manifest, painter.config, options.images, limit=options.images)
    painted, target = to_unit(painter.batch(batch.sketch, batch.hint)), to_unit(batch.color)
    down, right = (painted.diff(dim=dim) for dim in (2, 3))
    ours = losses.total_variation(painted)
    print(f"{Path(options.run).name}, {len(painted)} held-out pictures of {painted.shape[-1]}x{painted.shape[-1]}\n")
    print("total variation, mean of roots (ours)", f"{ours:.4f}")
    for name, mean in (
        ("sum |dx| + |dy| (tf.image.total_variation)", down.abs().mean() + right.abs().mean()),
        ("sum dx^2 + dy^2 (the authors' l2_loss)", down.square().mean() + right.square().mean()),
    ):
        print(f"{name} at 512x512: {PIXELS * mean:.0f}, {PIXELS * mean / ours:.3g} times ours")
    for layer in ("relu2_2", "relu3_2"):
        network = vgg.load(f"{options.weights.rstrip('/')}/vgg16-{layer}.safetensors", layer, None)
        with torch.no_grad():
            difference = network(painted) - network(target)
        l1, l2 = difference.abs().mean(), difference.square().mean()
        print(f"{layer}, mean square (ours) {l2:.4f}")
        print(f"{layer}, mean absolute {l1:.4f}: {l1 / l2:.3g} times ours")
        print(f"the same of Caffe's features of [-1, 1] * 255: {2 * CAFFE_SCALE * l1 / l2:.3g} times ours")


if __name__ == "__main__":
    main()
