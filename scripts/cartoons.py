"""Generated cartoons, packed: data sets for the scripts that break things."""

import tempfile

import cv2
import numpy as np

from autopainter.data import pack, sources


def pack_cartoons(destination: str, pictures: int, size: int = 40) -> str:
    """Pack coloured circles with dark outlines: several small shards with chunks of different sizes.

    Args:
        size: edge in pixels.

    Returns:
        The URI of the manifest.
    """
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(pictures):
            image = np.full((size, size, 3), 255, np.uint8)
            for _ in range(3):
                center = (draw.integers(8, 32, 2) * size // 40).tolist()
                radius = int(draw.integers(4, 12)) * size // 40
                cv2.circle(image, center, radius, draw.integers(40, 230, 3).tolist(), -1)
                cv2.circle(image, center, radius, (20, 20, 20), max(size // 40, 1))
            cv2.imwrite(f"{folder}/picture{number:03d}.png", image)
        options = pack.PackOptions(shard_samples=32, validation=0.1)
        pack.pack(sources.ColorImages(folder, size=size), destination, options, workers=1)
    return f"{destination}/manifest.json"
