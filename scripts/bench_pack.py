"""How fast each source is packed, and a large data set packed and streamed once.

python scripts/bench_pack.py sources [--images 300] [--size 512]
python scripts/bench_pack.py large [--images 60000] [--size 512] [--folder FOLDER]
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
from measuring import MemoryWatch, bench_config, cpu
from services import SeaweedFS

from autopainter.cgroup import Groups
from autopainter.data import manifest, pack, pictures
from autopainter.data.sketch import xdog
from autopainter.data.sources import ColorImages, MatchedFolders, OpenMoji, SideBySide, Source
from autopainter.data.stream import TrainingStream
from autopainter.progress import progress_bar

TILE = 256
TILES = 400
PARTS = 10


def tiles() -> list[pictures.Image]:
    """Some of the OpenMoji pictures, uint8 [TILE, TILE, 3]."""
    source = OpenMoji(TILE)
    items = source.listing().items
    return [source.pairs(item, source.fetch(item))[0].color for item in items[1000 : 1000 + TILES]]


def scene(emoji: list[pictures.Image], number: int, size: int) -> pictures.Image:
    """A picture of its own for each number: four drawings on a coloured ground, recoloured, with a soft light."""
    random = np.random.default_rng(number)
    four = [emoji[index].astype(np.float32) for index in random.integers(len(emoji), size=4)]
    image = np.vstack([np.hstack(four[:2]), np.hstack(four[2:])])
    image = cv2.transform(
        image, random.dirichlet((1, 1, 1), 3).astype(np.float32) * 0.5 + np.eye(3, dtype=np.float32) / 2
    )
    light = np.linspace(random.uniform(0.6, 1), 1, image.shape[1], dtype=np.float32)[None, :, None]
    image = image * light * (0.75 + 0.25 * random.random(3, np.float32))
    return pictures.resize(np.clip(image, 0, 255).astype(np.uint8), size, size)


def write_scenes(folder: Path, first: int, count: int, size: int) -> None:
    """JPEG files of scenes."""
    emoji = tiles()
    for number in range(first, first + count):
        data = cv2.imencode(".jpg", cv2.cvtColor(scene(emoji, number, size), cv2.COLOR_RGB2BGR))[1]
        (folder / f"{number:06d}.jpg").write_bytes(data.tobytes())


def write_png(path: Path, image: pictures.Image) -> None:
    """A PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image)


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """A folder that is deleted afterwards, if it was not named."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="bench-pack-") as name:
            yield Path(name)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench_pack() -> None:
    """Measure packing."""


@bench_pack.command()
@click.option("--images", default=300, show_default=True, help="Pictures of each source.")
@click.option("--size", default=512, show_default=True, help="Edge of the pictures in pixels.")
@click.option("--rounds", default=3, show_default=True, help="Times that each is packed, in turns.")
def sources(images: int, size: int, rounds: int) -> None:
    """Images/s of one core for each source, from a folder to a folder."""
    with scratch(None) as folder:
        emoji = tiles()
        for number in range(images):
            color = scene(emoji, number, size)
            drawing = xdog(color)
            cv2.imwrite(str(_made(folder / "images") / f"{number}.jpg"), cv2.cvtColor(color, cv2.COLOR_RGB2BGR))
            write_png(folder / "colors" / f"{number}.png", color)
            write_png(folder / "sketches" / f"{number}.png", drawing)
            write_png(folder / "sides" / f"{number}.png", np.hstack([color, np.repeat(drawing[:, :, None], 3, axis=2)]))
        cases: dict[str, Source] = {
            "images (JPEG), XDoG": ColorImages(str(folder / "images"), size),
            "images (JPEG), drawings on the fly": ColorImages(str(folder / "images"), size, sketch="on_the_fly"),
            "side-by-side (PNG), right": SideBySide(str(folder / "sides"), size, "right"),
            "side-by-side (PNG), auto": SideBySide(str(folder / "sides"), size, "auto"),
            "folders (PNG)": MatchedFolders(str(folder / "colors"), str(folder / "sketches"), size),
            "openmoji (SVG)": OpenMoji(size),
        }
        rates: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, source in cases.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                began = time.perf_counter()
                made = pack.pack(source, str(folder / "out"), pack.PackOptions(limit=images), workers=1)
                rates[name].append(sum(made.samples.values()) / (time.perf_counter() - began))
    click.echo(f"{cpu()}; {images} pictures of {size} x {size} pixels, {rounds} rounds, one process\n")
    click.echo("| source | images/s a core (median) | lowest to highest |\n| --- | --- | --- |")
    for name, found in rates.items():
        click.echo(f"| {name} | {statistics.median(found):.1f} | {min(found):.1f} to {max(found):.1f} |")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@bench_pack.command()
@click.option("--images", default=60_000, show_default=True, help="Pictures that are generated, packed and streamed.")
@click.option("--size", default=512, show_default=True, help="Edge of the pictures in pixels.")
@click.option("--batch", default=48, show_default=True, help="Samples of a batch.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keeps the generated pictures for another run.")
def large(images: int, size: int, batch: int, folder: Path | None) -> None:
    """Pack a folder of many generated pictures into S3 and stream one epoch of it."""
    cores = Groups().usable_cores()
    with scratch(folder) as place, SeaweedFS(place / "s3") as server:
        os.environ.update(server.env)
        inputs = _made(place / f"images-{images}-{size}")
        if sum(1 for _ in inputs.iterdir()) < images:
            share = -(-images // cores)
            with ProcessPoolExecutor(cores) as processes:
                parts = [
                    processes.submit(write_scenes, inputs, first, min(share, images - first), size)
                    for first in range(0, images, share)
                ]
                seconds, _ = timed("generating", lambda: [part.result() for part in parts], server.pid)
            click.echo(f"generated {images} pictures in {seconds:.0f} s")
        source = ColorImages(str(inputs), size)
        with progress_bar() as progress:
            seconds, made = timed(
                "packing", lambda: pack.pack(source, "s3://datasets/large", progress=progress), server.pid
            )
        count = sum(made.samples.values())
        click.echo(
            f"packed {count} pairs, {made.bytes / 1e9:.2f} GB, in {seconds:.0f} s: {count / seconds:.0f} images/s"
            f" on {cores} cores ({cpu()})"
        )
        data = manifest.load(made.uri)
        config = bench_config({
            "data.manifest": made.uri, "data.image_size": size, "train.global_batch": batch,
            "loss.feature_weight": 0, "data.decode_threads": cores,
        })  # fmt: skip
        stream = TrainingStream(data, config, 0, 1, 0)
        steps = made.samples["train"] // batch
        seconds, keys = timed("streaming", lambda: {key for _ in range(steps) for key in next(stream).keys}, server.pid)
        stream.close()
        assert len(keys) == steps * batch
        click.echo(
            f"streamed an epoch, {len(keys)} samples, in {seconds:.0f} s: {len(keys) / seconds:.0f} samples/s, read"
            f" {stream.split.bytes_read / 1e9:.2f} GB; the stream's own bound on its memory is"
            f" {stream.most_bytes / 2**20:.0f} MiB"
        )


def timed(what: str, work: Callable[[], Any], without: int) -> tuple[float, Any]:
    """Seconds and result of a piece of work; prints the memory of this process and its children in parts of it."""
    watch = MemoryWatch(os.getpid(), period_seconds=1.0, without=without)
    watch.start()
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    watch.stop()
    parts = np.array_split(np.array(watch.history_bytes or [0]) / 2**20, min(PARTS, max(len(watch.history_bytes), 1)))
    click.echo(
        f"{what}: highest memory in MiB, by tenths of the time: " + " ".join(f"{part.max():.0f}" for part in parts)
    )
    return seconds, result


if __name__ == "__main__":
    bench_pack()
