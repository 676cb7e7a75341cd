"""The quickstart as a user runs it, small: interrupted, continued to a sheet, kept running, and nothing left.

Run: pytest tests/test_quickstart.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import cv2
import pytest
import quickstart as script
from conftest import ROOT
from waiting import PATIENCE_SECONDS, until

from autopainter.processor import fast_precision


def quickstart(folder: Path, *options: str) -> subprocess.Popen[str]:
    # In a session of its own, as in a terminal of its own: Ctrl-C reaches all that belongs to it and nothing else.
    return subprocess.Popen(
        [sys.executable, "scripts/quickstart.py", "--folder", str(folder), "--size", "32", *options],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "settings"),
    [
        ("9.0\n" * 5, {"cluster.workers": "4", "train.precision": "bfloat16"}),
        ("8.0\n7.5\n", {"cluster.workers": "2", "train.precision": "float32"}),
        ("No devices were found\n", {"cluster.workers": "2", "train.precision": fast_precision()}),
    ],
)
def test_it_trains_on_the_gpus_in_a_precision_that_all_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, settings: dict[str, str]
) -> None:
    (tmp_path / "answer").write_text(answer)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert script._hardware_settings() == settings


def processes(marker: str) -> list[str]:
    """Command lines of living processes that mention the marker, or inherited it in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if marker.encode() in command + environment and int(entry.name) != os.getpid():
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture
def marker(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """A text in the environment of every process of a quickstart."""
    monkeypatch.setenv("QUICKSTART_TEST", folder.name)
    return f"QUICKSTART_TEST={folder.name}"


def test_ctrl_c_leaves_nothing_and_the_next_call_paints(folder: Path, marker: str) -> None:
    program = quickstart(folder, "--steps", "100000")
    assert program.stdout is not None
    for line in program.stdout:
        if match := re.search(r"metrics at (http://127.0.0.1:\d+/metrics)", line):
            break
    else:
        pytest.fail("the run ended by itself")
    served = urllib.request.urlopen(match[1], timeout=30).read().decode()
    assert 'autopainter_images_total{run="quickstart-32"}' in served
    os.killpg(program.pid, signal.SIGINT)
    rest = program.communicate(timeout=PATIENCE_SECONDS)[0]
    assert program.returncode == 130, rest
    assert "the same command continues" in rest
    assert processes(marker) == []
    stopped = re.search(r"stopped at the checkpoint of step (\d+)", rest)
    assert stopped, rest

    program = quickstart(folder, "--steps", str(int(stopped[1]) + 10))
    output = program.communicate(timeout=PATIENCE_SECONDS)[0]
    assert program.returncode == 0, output
    assert f"from its checkpoint of step {stopped[1]}" in output
    sheet = cv2.imread(str(folder / "sheet-32.png"))
    assert sheet.shape[0] > 1000
    assert sheet.std() > 10
    for text in ("painted with hints", "validation samples", "TensorBoard:", "total"):
        assert text in output
    assert (folder / "env").stat().st_mode & 0o077 == 0
    # The run can be continued from a shell only in the precision that it began in.
    assert f"export AUTOPAINTER__TRAIN__PRECISION={fast_precision()}\n" in (folder / "env").read_text()
    assert (folder / "credentials.json").stat().st_mode & 0o077 == 0
    assert processes(marker) == []


def test_what_is_kept_running_can_be_looked_at_and_stopped(folder: Path, marker: str) -> None:
    program = quickstart(folder, "--steps", "1", "--keep-running")  # more are done
    output = program.communicate(timeout=PATIENCE_SECONDS)[0]
    assert program.returncode == 0, output
    for text in ("already packed", "already there", "is finished"):
        assert text in output
    board = next(line.split()[-1] for line in output.splitlines() if line.startswith("TensorBoard:"))
    until(lambda: json.load(urllib.request.urlopen(f"{board}/data/runs", timeout=60)) == ["quickstart-32/events"])
    assert len(processes(marker)) >= 2

    program = quickstart(folder, "--stop")
    output = program.communicate(timeout=PATIENCE_SECONDS)[0]
    assert program.returncode == 0, output
    assert processes(marker) == []
