"""A trained painter as one file that other programs run without this one: ONNX, or a program of torch.export.

What goes wrong with exported painters stands around the network: pixels scaled or padded otherwise than in training,
dropout and norms left in training mode. So all of it is in the file: stored pixels go in, a picture comes out.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental import _config as symbolic

from autopainter import __version__, outputs, storage
from autopainter.errors import UserError
from autopainter.extras import need
from autopainter.models.unet import UNet
from autopainter.paint import Painter, Step
from autopainter.pixels import network_input
from autopainter.storage import LocalStore
from autopainter.uri import split

Format = Literal["onnx", "torch-export"]
Program = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

METADATA = "autopainter.json"
"""Extra file of a torch.export archive that holds what ONNX keeps in ``metadata_props``."""
TOLERANCE = 1e-3
"""Greatest difference of a painted value in [0, 1]: a quarter of the step between two 8 bit values, so that rounding to
pixels gives the same value or its neighbour. Other orders of float32 additions stay far below it; dropout, another
norm's mode or another padding come out far above."""
_OPSET = 20  # torch's own default: what its exporter is tested with, and has all that is needed here
_INPUTS, _OUTPUT = ("sketch", "hint"), "painted"
_BATCHES = (1, 3)


class Mismatch(RuntimeError):
    """The exported program paints something else than the painter."""


class PixelPainter(nn.Module):
    """What the file computes: ``Painter.batch`` without the rounding."""

    def __init__(self, generator: UNet) -> None:
        super().__init__()
        self.generator = generator.eval()

    def forward(self, sketch: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
        """Paint sketches of any H and W.

        Args:
            sketch: uint8 [B, 1, H, W], dark lines on white.
            hint: uint8 [B, 4, H, W], RGB and a mask: 1 where there is a hint, 0 elsewhere; above 1 counts as 1.

        Returns:
            float32 [B, 3, H, W] RGB in [0, 1].
        """
        height, width = sketch.shape[-2:]
        stride = 1 << self.generator.levels
        # Not -height % stride: ONNX rounds the division of a negative number towards zero.
        below = (height + stride - 1) // stride * stride - height
        right = (width + stride - 1) // stride * stride - width
        condition = network_input(sketch, torch.cat([hint[:, :3], hint[:, 3:].clamp(max=1)], dim=1))
        painted: torch.Tensor = self.generator(F.pad(condition, (0, right, 0, below), mode="replicate"))
        return (painted[..., :height, :width] + 1) / 2


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        step: training steps behind the painter.
        bytes: size of the file.
        difference: greatest absolute difference to the painter, of values in [0, 1], over all pictures compared.
    """

    step: int
    bytes: int
    difference: float


def export(run_uri: str, step: Step | None, kind: Format, output: str) -> Exported:
    """Export the averaged generator of a run; the file is written only if it paints what the run paints.

    Args:
        run_uri: folder or s3:// URI of the run.
        step: as ``Painter.load`` takes it.
        kind: ``onnx`` needs the packages of the extra ``export``.
        output: path or s3:// URI of the file.

    Raises:
        UserError: the run has no such checkpoint, there is a file already, or a package is missing.
        CorruptData: the checkpoint asked for is damaged.
        Mismatch: the program paints something else; nothing is written.
    """
    if kind == "onnx":
        need("--format onnx", "export", "onnxscript", "onnxruntime")
    folder, name = split(output)
    if not name:
        raise UserError(f"--output: {output}: must be a file, not a folder")
    store = storage.open_store(folder)
    if isinstance(store, LocalStore):
        outputs.check_file(Path(output), "--output")
    taken = UserError(f"--output: {output}: is there already; delete it or choose another name")
    if store.size(name) is not None:
        raise taken
    painter = Painter.load(run_uri, step, torch.device("cpu"))
    with _quiet(), torch.no_grad():
        data = _to_onnx(painter) if kind == "onnx" else _to_torch_export(painter)
        difference = compare(painter, _run_onnx(data) if kind == "onnx" else _run_torch_export(data))
    if not difference <= TOLERANCE:
        raise Mismatch(
            f"{output}: not written: the {kind} program of step {painter.step} differs from the painter by"
            f" {difference:.2g}, and at most {TOLERANCE:g} is allowed"
        )
    if not store.create(name, data):
        raise taken
    return Exported(painter.step, len(data), difference)


def compare(painter: Painter, program: Program) -> float:
    """Greatest absolute difference between a program's and the painter's values in [0, 1]; NaN if any value is NaN.

    Random sketches and hints, in batches of 1 and 3: of the size of training, and of an odd oblong size that is padded.
    """
    size = painter.config.data.image_size
    reference = PixelPainter(painter.generator)
    differences = []
    for height, width in ((size, size), (size // 2 + 1, size + 1)):
        for batch in _BATCHES:
            sketch, hint = _random_pixels(batch, height, width)
            painted, expected = program(sketch, hint), reference(sketch, hint)
            if painted.shape != expected.shape:
                return float("inf")
            differences.append((painted - expected).abs().max())
    return torch.stack(differences).max().item()


def _random_pixels(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(batch)
    pixels = torch.randint(0, 256, (batch, 5, height, width), generator=random, dtype=torch.uint8)
    pixels[:, 4] %= 2
    return pixels[:, :1], pixels[:, 1:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporters say to their own developers from the user's stderr."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _metadata(painter: Painter) -> dict[str, str]:
    return {
        "run": painter.config.run.name,
        "step": str(painter.step),
        "data_set": painter.manifest_id,
        "image_size": str(painter.config.data.image_size),
        "stride": str(1 << painter.generator.levels),
        "autopainter": __version__,
    }


def _example(painter: Painter) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures to trace with, whose innermost map is 2x3: a size of 1 would be taken for a constant."""
    stride = 1 << painter.generator.levels
    return _random_pixels(2, stride + 1, 2 * stride + 1)


def _dynamic_shapes() -> dict[str, dict[int, torch.export.Dim]]:
    axes = {axis: torch.export.Dim(name, min=1) for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    return dict.fromkeys(_INPUTS, axes)


def _to_onnx(painter: Painter) -> bytes:
    program = torch.onnx.export(
        PixelPainter(painter.generator),
        _example(painter),
        dynamo=True,
        opset_version=_OPSET,
        input_names=_INPUTS,
        output_names=[_OUTPUT],
        dynamic_shapes=_dynamic_shapes(),
        verbose=False,
    )
    assert program is not None  # as it is for the exporter of old
    model = program.model
    model.metadata_props.update(_metadata(painter))
    model.doc_string = " ".join((PixelPainter.forward.__doc__ or "").split())
    shape = model.graph.outputs[0].shape
    assert shape is not None
    shape[2], shape[3] = "height", "width"  # the exporter's own names are formulas with the stride
    data: bytes = program.model_proto.SerializeToString()
    return data


def _run_onnx(data: bytes) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(sketch: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
        (painted,) = session.run([_OUTPUT], {"sketch": sketch.numpy(), "hint": hint.numpy()})
        return torch.from_numpy(painted)

    return run


def _to_torch_export(painter: Painter) -> bytes:
    # Otherwise an innermost map of 1x1, which is what a picture of the size of training has, is refused: torch.export
    # assumes that no size is 1. torch.onnx.export sets the same.
    with symbolic.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # it is added when torch starts
        program = torch.export.export(
            PixelPainter(painter.generator), _example(painter), dynamic_shapes=_dynamic_shapes()
        )
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(_metadata(painter))})
    return file.getvalue()


def _run_torch_export(data: bytes) -> Program:
    program: Program = torch.export.load(io.BytesIO(data)).module()
    return program
