"""Which precision suits a processor, and that a run with the other one says so.

Run: pytest tests/test_processor.py
"""

from pathlib import Path

import pytest
import torch

from autopainter import config as configuration
from autopainter import loop
from autopainter.doctor import gpus
from autopainter.processor import fast_precision

SLOW = "not known to"


@pytest.mark.parametrize(
    ("flags", "precision"),
    [("fpu avx512f amx_bf16 amx_tile", "bfloat16"), ("avx512_bf16", "bfloat16"), ("fpu avx2 avx512f", "float32")],
)
def test_bfloat16_suits_cores_that_multiply_in_it(tmp_path: Path, flags: str, precision: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")
    assert fast_precision(tmp_path / "cpuinfo") == precision


def test_a_processor_that_is_not_described_gets_float32(tmp_path: Path) -> None:
    assert fast_precision(tmp_path / "cpuinfo") == "float32"


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_run_on_a_processor_that_is_slow_in_its_precision_says_so(
    small_settings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    more = [f"run.storage={tmp_path}", f"train.precision={precision}", "train.steps=1"]
    config = configuration.load(None, [*small_settings, *more], environment={})
    slow = precision == "bfloat16" and fast_precision() == "float32"
    loop.train(config, torch.device("cpu"))
    said = [message for message in caplog.messages if SLOW in message]
    assert len(said) == slow
    assert all("set train.precision=float32" in message for message in said)
    if not torch.cuda.is_available():
        (row,) = [row for row in gpus.check(config, elsewhere=False) if row.check == "arithmetic"]
        assert row.result == ("warning" if slow else "ok")
        assert (SLOW in row.detail) == ("train.precision to float32" in row.advice) == slow
