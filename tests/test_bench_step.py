"""The scripts that measure a step: both ways of doing it give the same results, and the tables say what was asked.

Run: pytest tests/test_bench_step.py
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys

import pytest
import torch
from bench_step import VARIANTS, Plain, random_batch, random_features, settings_of
from conftest import ROOT
from waiting import PATIENCE_SECONDS

from autopainter.trainer import SCALARS

SMALL = ["model.generator_width=4", "model.discriminator_width=4"]


def script(name, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("plain", "compile")])
def test_every_variant_does_what_the_plain_one_does(name, tmp_path):
    """With the plain one's norm and no dropout; bfloat16 to its precision. Compiled steps are in test_trainer.py."""
    options = argparse.Namespace(size=32, microbatch=2, batch=None, set=[])
    same = {"model.norm": "group", "model.dropout": 0} | (
        {"train.precision": "float32"} if "bfloat16" not in name else {}
    )
    options.set = [*SMALL, *(f"{field}={value}" for field, value in same.items())]
    features = random_features(tmp_path, "relu2_2")
    chosen = settings_of(VARIANTS[name], options, features)
    plain = Plain(settings_of(VARIANTS["plain"], options, features), torch.device("cpu"))
    ours = VARIANTS[name].step(chosen, torch.device("cpu"))
    for step in range(3):
        expected = plain.step(step, random_batch(chosen, step))
        scalars = dict(zip(SCALARS, ours.step(step, random_batch(chosen, step)).tolist(), strict=False))
        found = torch.tensor([scalars["discriminator/loss"], scalars["generator/loss"]])
        assert torch.allclose(found, expected, rtol=0.02 if name == "bfloat16" else 1e-4), step


def test_the_table_of_steps(tmp_path):
    done = script(
        "bench_step.py", "--size", 32, "--microbatch", 1, "--batch", 2, "--rounds", 2, "--steps", 1, "--threads", 1,
        "--variants", "plain", "bfloat16", "--json", tmp_path / "out.json", "--set", SMALL[0], "--set", SMALL[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert "32 px, 2 images a step, 1 at once" in head
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith("| ")][2:]
    assert [row[0] for row in cells] == ["pix2pix's recipe", "+ bfloat16: **the default**"]
    assert cells[0][2] == "1.00"
    measured = json.loads((tmp_path / "out.json").read_text())
    assert {name: len(turns) for name, turns in measured["turns"].items()} == {"plain": 2, "bfloat16": 2}
    speeds = [2 / seconds for seconds, _ in measured["turns"]["bfloat16"]]
    assert float(cells[1][1].split()[0]) == pytest.approx(statistics.median(speeds), rel=0.01)
    assert measured["flops"] > 1e6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["bench_step", "memory_table"])
def test_a_device_that_is_not_there_is_refused(name):
    done = script(f"{name}.py", "--device", "cuda")
    assert done.returncode == 2
    assert done.stderr == f"{name}: --device cuda: torch finds no GPU here\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_session_says_what_it_would_do(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "scripts/gpu_session.sh", "--folder", tmp_path / "session"], text=True, capture_output=True,
        env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 3
    parts = re.findall(r"^  (\w+), at most (\d+) s$", done.stderr, re.MULTILINE)
    assert [name for name, _ in parts] == ["correctness", "step", "memory", "training", "out_of_memory"]
    assert sum(int(seconds) for _, seconds in parts) <= 25 * 60
    assert not (tmp_path / "session").exists()


def test_the_table_of_memory():
    done = script("memory_table.py", "--size", 128)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("computed; 128 px\n\n| recomputed |")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows[2:]] == ["none", "outer", "all"]
    largest = [[int(number) for number in row[-1].split(" / ")] for row in rows[2:]]
    for cards in zip(*largest, strict=True):
        assert cards[0] < cards[1] < cards[2]
    assert all(numbers == sorted(numbers) and numbers[0] > 0 for numbers in largest)


def test_what_is_alive_is_counted_as_it_comes_and_goes():
    from memory_table import Alive

    with Alive() as alive:
        first = torch.ones(1000)
        assert alive.bytes == 4000
        view, second = first[:10], first * 2
        assert (alive.bytes, alive.peak_bytes) == (8000, 8000)
        del first
        assert alive.bytes == 8000  # the view needs it
        del view, second
        assert (alive.bytes, alive.peak_bytes) == (0, 8000)


def test_the_table_of_the_exchange():
    done = script(
        "bench_exchange.py",
        "--ranks",
        2,
        "--size",
        32,
        "--images",
        1,
        "--rounds",
        1,
        "--set",
        SMALL[0],
        "--set",
        SMALL[1],
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in done.stdout.splitlines()[4:]]
    assert [row[:2] for row in rows] == [
        ["2", "in buckets, during the backward pass"], ["2", "at once, after it"]
    ]  # fmt: skip
    assert rows[0][2] == rows[1][2]  # as much is sent either way
    assert all(float(row[4]) <= float(row[3]) for row in rows)


def test_the_tables_of_the_loader():
    done = script("bench_loader.py", "--images", 24, "--size", 64, "--rounds", 3)
    assert done.returncode == 0, done.stderr
    costs = dict(re.findall(r"^\| ([a-z, ]+) \| (\d+\.\d+) \|$", done.stdout, re.MULTILINE))
    whole = float(costs.pop("all of them"))
    assert 0 < whole <= 2 * float(costs.pop("the stream, its threads included")) + 1
    assert sum(map(float, costs.values())) == pytest.approx(whole, abs=0.05)
