"""What processors and GPUs compute in."""

from pathlib import Path
from typing import Literal

_BFLOAT16_UNITS = {"amx_bf16", "avx512_bf16"}  # flags of x86

BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability from which on GPUs have kernels of bfloat16: Ampere's."""


def fast_precision(described: Path = Path("/proc/cpuinfo")) -> Literal["bfloat16", "float32"]:
    """``train.precision`` for the cores of this machine: bfloat16 where they are known to multiply in it.

    Args:
        described: the file in which Linux describes the processor.
    """
    try:
        flags = described.read_text().split()
    except OSError:  # no Linux
        return "float32"
    return "float32" if _BFLOAT16_UNITS.isdisjoint(flags) else "bfloat16"
