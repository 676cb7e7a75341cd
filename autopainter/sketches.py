"""Files of sketches and hints: which ones are meant, how they are read, and what becomes of them."""

import io
import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps

from autopainter import memory, outputs
from autopainter.cleaning import clean
from autopainter.data import pictures
from autopainter.data.pictures import Image
from autopainter.errors import UserError, one_line
from autopainter.paint import NO_LAYER, Painter, check_layer

log = logging.getLogger(__name__)

_NAMED = 5  # files that a warning names at most


@dataclass(frozen=True)
class Job:
    """A sketch file, the file of its hints if it has any, and the PNG file that is painted."""

    sketch: Path
    hints: Path | None
    target: Path


@dataclass(frozen=True)
class Manner:
    """How sketches are painted.

    Attributes:
        size: length in pixels that the longer edge is resized to first; none: as it is.
        clean: whether they are photos of paper, see ``autopainter.cleaning``.
        tiled: as ``Painter.paint`` takes it.
    """

    size: int | None = None
    clean: bool = False
    tiled: bool | None = None


def plan(sketches: Sequence[Path], hints: Path | None, output: Path) -> list[Job]:
    """Find what is to be painted; nothing is written.

    Args:
        sketches: picture files, and folders: of these the pictures by name, without those in folders below them.
        hints: file of the hints of every sketch; or a folder, where a sketch's hints have its name, but for the suffix.
            What a folder has no hints for is named in a warning, and so are files that are nobody's hints.
        output: a PNG file for a single sketch file; else a folder.

    Raises:
        UserError: something is not there; the output does not fit, or would replace a sketch, its hints or another
            painting.
    """
    found: list[Path] = []
    for path in sketches:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        found += _pictures(path) if path.is_dir() else [path]
    inputs = [*found, *sketches]
    if hints:
        inputs += [hints, *(path for path in hints.iterdir() if path.is_file())] if hints.is_dir() else [hints]
    single = len(sketches) == 1 and not sketches[0].is_dir()  # a pipe may be one
    targets = _targets(found, output, single, {path.resolve() for path in inputs})
    colors = _hints(found, hints)
    return [Job(path, hint, target) for path, hint, target in zip(found, colors, targets, strict=True)]


def _pictures(folder: Path) -> list[Path]:
    """Pictures right in a folder, hidden ones excepted, in the order of their names."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = [path for path in files if path.suffix.lower() in pictures.SUFFIXES]
    if not found:
        raise UserError(f"{folder}: no pictures in it; looked for {', '.join(pictures.SUFFIXES)}")
    if others := len(files) - len(found):
        log.warning("%s: %d file(s) in it are no pictures by their names and are passed over", folder, others)
    return found


def _targets(found: Sequence[Path], output: Path, single: bool, inputs: Set[Path]) -> list[Path]:
    """The file that each sketch is painted into; a single one's may be the output itself, none's an input."""
    if output.is_dir():
        is_file = False
    else:
        is_file = single and output.suffix.lower() == ".png"
        file_like = output.suffix[1:2].isalpha() if single else output.suffix.lower() in pictures.SUFFIXES
        if not is_file and file_like:
            raise UserError(f"--output: {output}: must be a .png file for one sketch, and a folder for several")
        if not is_file and output.exists():
            raise UserError(f"--output: {output}: is a file; name a folder, or a .png file for one sketch")
    targets = [output if is_file else output / f"{path.stem}.png" for path in found]
    for target in targets:
        outputs.check_file(target, "--output")
    painted: dict[Path, Path] = {}
    for path, target in zip(found, targets, strict=True):
        if {target.resolve(), target.parent.resolve()} & inputs:
            raise UserError(f"--output: {output}: the sketches or their hints are there; choose another place")
        if target in painted:
            raise UserError(f"{path}: would become {target}, like {painted[target]}; rename one of them")
        painted[target] = path
    return targets


def _hints(found: Sequence[Path], hints: Path | None) -> Sequence[Path | None]:
    """The file of each sketch's hints."""
    if hints is None:
        return [None] * len(found)
    if not hints.is_dir():
        read_hints(hints)  # one that is none is refused once, before anything is painted
        return [hints] * len(found)
    by_name: dict[str, Path] = {}
    for path in _pictures(hints):
        if path.stem in by_name:
            raise UserError(f"--hints: {path} and {by_name[path.stem].name} are for the same sketch; keep one of them")
        by_name[path.stem] = path
    several = [by_name.get(path.stem) for path in found]
    if not any(several):
        raise UserError(f"--hints: {hints}: no file in it has the name of a sketch, such as {found[0].stem}.png")
    for path, hint in zip(found, several, strict=True):
        if hint is None:
            log.warning("%s: painted without hints: %s has no %s.png", path, hints, path.stem)
    if others := [path.name for path in by_name.values() if path not in several]:
        some = ", ".join(others[:_NAMED]) + (", ..." if len(others) > _NAMED else "")
        log.warning("%s: %d file(s) in it have the name of no sketch: %s", hints, len(others), some)
    return several


def paint_file(painter: Painter, job: Job, manner: Manner) -> None:
    """Paint one sketch file; its folder is made if need be.

    Raises:
        UserError: the sketch or its hints cannot be read, or do not belong together; too little memory for them.
    """
    try:
        painted = _painted(painter, job, manner)
        pictures.write_png(job.target, painted)
    except (MemoryError, RuntimeError, cv2.error) as error:
        if not memory.ran_out(error):
            raise
        raise UserError(f"{job.sketch}: too little memory to read and paint it; make it smaller") from None


def _painted(painter: Painter, job: Job, manner: Manner) -> Image:
    sketch = read_sketch(job.sketch, manner.size, manner.clean)
    hints = read_hints(job.hints, manner.size) if job.hints else None
    if hints is not None and hints[..., 3].max() < 128:
        log.warning(
            "%s: holds no hints: no pixel is at least half opaque; %s is painted without", job.hints, job.sketch
        )
    trained = painter.config.data.image_size
    if manner.tiled is None and painter.tiled(*sketch.shape):
        log.warning(
            "%s: %dx%d is large for a network trained at %dx%d and is painted in tiles; --size %d paints it at once",
            job.sketch, sketch.shape[1], sketch.shape[0], trained, trained, trained,
        )  # fmt: skip
    try:
        return painter.paint(sketch, hints, manner.tiled)
    except UserError as error:
        raise UserError(f"{job.sketch}: {error}") from None


def read_sketch(path: Path, size: int | None = None, cleaned: bool = False) -> Image:
    """Read a sketch file as uint8 [H, W], turned as its EXIF orientation says, transparency laid on white.

    Args:
        size: length that the longer edge is resized to; none: as it is.
        cleaned: make a drawing of a photo first.

    Raises:
        UserError: the file cannot be read or is no picture.
    """
    try:
        color = pictures.decode(_bytes(path))
    except pictures.BrokenInput as error:
        raise UserError(f"{path}: {error}") from None
    sketch = clean(color) if cleaned else cv2.cvtColor(color, cv2.COLOR_RGB2GRAY)
    return pictures.resize(sketch, *pictures.scaled(sketch, size)) if size else sketch


def read_hints(path: Path, size: int | None = None) -> Image:
    """Read a PNG with transparency as uint8 [H, W, 4] RGBA; the opaque pixels are the hints.

    Args:
        size: as for ``read_sketch``.

    Raises:
        UserError: the file cannot be read, is damaged, or nothing in it is transparent.
    """
    data = _bytes(path)
    try:
        pictures.check_pixels(data)
        with PIL.Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as opened:
            if not opened.has_transparency_data:
                raise UserError(NO_LAYER)
            image = check_layer(np.array(PIL.ImageOps.exif_transpose(opened).convert("RGBA")))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except PIL.UnidentifiedImageError:  # an image of another format
        raise UserError(f"{path}: {NO_LAYER}") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder makes of damaged bytes
        raise UserError(f"{path}: damaged: {one_line(error)}") from None
    # No filter: a hint's edge must not mix with the nothing around it.
    return cv2.resize(image, pictures.scaled(image, size), interpolation=cv2.INTER_NEAREST) if size else image


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
