"""Checks of the GPUs, and of the arithmetic of whatever trains."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from autopainter.config import Config
from autopainter.doctor.findings import Finding, failed, gib, ok, one_line, skipped, warning
from autopainter.doctor.limits import within
from autopainter.processor import BFLOAT16_CAPABILITY, fast_precision

if TYPE_CHECKING:  # a broken torch shall be a finding
    import torch

_DRIVER = Path("/proc/driver/nvidia/version")
_DEVICES = Path("/dev")
_SECONDS = 120.0
"""The first use of many GPUs takes long; a driver that hangs takes for ever."""
_EDGE = 256
_TOLERANCE = 2**-6  # of the largest number of a product; bf16 has 8 bits
_LEAST_FREE = 0.8


def check(config: Config | None, elsewhere: bool) -> Iterator[Finding]:
    """Check every GPU that torch can use, else the processor.

    Args:
        elsewhere: training may run on other machines than this one.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        yield failed("torch", one_line(error), "pip install -c constraints.txt --force-reinstall torch")
        return
    build = f"torch {torch.__version__}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = within(_SECONDS, lambda: torch.cuda.device_count() if torch.cuda.is_available() else 0)
    bfloat16 = config is not None and config.train.precision == "bfloat16" and not elsewhere
    if not usable:
        wanted = config is not None and config.cluster.gpus is True and not elsewhere
        yield _none(wanted, torch.version.cuda, " ".join(str(entry.message) for entry in said))
        yield _processor(build, bfloat16)
        return
    yield ok("GPUs", f"{usable}, driver {driver()}, {build}")
    for number in range(usable):
        yield _gpu(torch.device("cuda", number), bfloat16)


def driver() -> str:
    """Version of NVIDIA's driver."""
    try:
        found = re.search(r"Module(?: for \S+)?\s+(\d[\d.]*)", _DRIVER.read_text())
    except OSError:
        found = None
    return found[1] if found else "unknown"


def _none(wanted: bool, cuda: str | None, said: str) -> Finding:
    """There is no GPU, or torch cannot use it."""
    if any(_DEVICES.glob("nvidia[0-9]*")):
        if cuda is None:
            advice = "install a CUDA build of torch (the image's build argument), or set cluster.gpus to false"
            finding = failed if wanted else warning
            return finding("GPUs", "this machine has some, but this torch is built for the processor only", advice)
        return failed(
            "GPUs",
            f"this machine has some, driver {driver()}, but torch for CUDA {cuda} cannot use them. {said}".strip(),
            f"install a driver that knows CUDA {cuda}, or a torch for an older one; look at nvidia-smi",
        )
    if wanted:
        return failed(
            "GPUs",
            "cluster.gpus is true, and this machine has none",
            "run doctor where the workers run, with their GPUs (docker run --gpus all, resources.limits:"
            " nvidia.com/gpu), or set cluster.gpus to false",
        )
    return skipped("GPUs", "none here")


def _gpu(device: "torch.device", bfloat16: bool) -> Finding:
    """A GPU; ``bfloat16``: a run is to train with it here."""
    import torch

    name = f"GPU {device.index}"
    try:
        about = torch.cuda.get_device_properties(device)
        free, total = within(_SECONDS, lambda: torch.cuda.mem_get_info(device))
        right = within(_SECONDS, lambda: product_is_right(device))
    except (RuntimeError, OSError) as error:  # torch's errors of CUDA are RuntimeErrors
        return failed(name, one_line(error), "look at nvidia-smi and dmesg for this GPU; reset it or leave it out")
    detail = f"{about.name}, {gib(total)}, {gib(free)} free"
    if not right:
        return failed(name, f"{detail}; a bf16 product is wrong", "leave this GPU out: its results cannot be trusted")
    if bfloat16 and (about.major, about.minor) < BFLOAT16_CAPABILITY:
        detail = f"{detail}; older than Ampere, without kernels of bfloat16, which train.precision is"
        return failed(name, detail, "set train.precision to float32 for a new run, or leave this GPU out")
    if free < _LEAST_FREE * total:
        return warning(name, detail, "another process uses it (nvidia-smi); end it, or training gets what is left")
    return ok(name, f"{detail}; bf16 product right")


def _processor(build: str, bfloat16: bool) -> Finding:
    """The processor's arithmetic; ``bfloat16``: a run is to train with it here."""
    import torch

    try:
        right = within(_SECONDS, lambda: product_is_right(torch.device("cpu")))
    except (RuntimeError, OSError) as error:
        return failed("arithmetic", one_line(error), "install a torch that fits this processor")
    if not right:
        return failed(
            "arithmetic", f"{build}: a bf16 product on the processor is wrong", "use another machine or torch"
        )
    detail = f"{build}: bf16 product on the processor right"
    if bfloat16 and fast_precision() == "float32":
        return warning(
            "arithmetic",
            f"{detail}, but not known to be fast here, and train.precision is bfloat16",
            "set train.precision to float32 for a new run, or train on GPUs",
        )
    return ok("arithmetic", detail)


def product_is_right(device: "torch.device") -> bool:
    """Whether a product of two bf16 matrices of small integers is finite and what it must be."""
    import torch

    numbers = torch.arange(_EDGE * _EDGE).reshape(_EDGE, _EDGE)
    left, right = (numbers % 7 - 3).float(), (numbers % 5 - 2).float()
    exact = left @ right  # sums of less than 2**24, which float32 holds exactly
    made = (left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16)).float().cpu()
    return bool(torch.isfinite(made).all() and (made - exact).abs().max() <= _TOLERANCE * exact.abs().max())
