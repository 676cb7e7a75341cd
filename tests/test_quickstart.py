"""The quickstart as a user runs it, small: from nothing to a sheet, continued, interrupted, and nothing left running.

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
from conftest import ROOT
from waiting import PATIENCE_SECONDS, until


def quickstart(folder: Path, *options: str) -> subprocess.Popen[str]:
    # In a session of its own, as in a terminal of its own: Ctrl-C reaches all that belongs to it and nothing else.
    return subprocess.Popen(
        [sys.executable, "scripts/quickstart.py", "--folder", str(folder), "--size", "32", *options],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


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


def test_from_nothing_to_painted_pictures(folder: Path, marker: str) -> None:
    program = quickstart(folder, "--steps", "20")
    output = program.communicate(timeout=PATIENCE_SECONDS)[0]
    assert program.returncode == 0, output
    sheet = cv2.imread(str(folder / "sheet-32.png"))
    assert sheet.shape[0] > 1000
    assert sheet.std() > 10
    for text in ("painted with hints", "validation samples", "TensorBoard:", "total"):
        assert text in output
    assert (folder / "env").stat().st_mode & 0o077 == 0
    assert (folder / "credentials.json").stat().st_mode & 0o077 == 0
    assert processes(marker) == []


def test_ctrl_c_leaves_nothing_and_the_next_call_continues(folder: Path, marker: str) -> None:
    program = quickstart(folder, "--steps", "100000")
    assert program.stdout is not None
    continued = False
    for line in program.stdout:
        continued |= "continuing run s3://autopainter/runs/quickstart-32 from its checkpoint of step 20" in line
        if match := re.search(r"metrics at (http://127.0.0.1:\d+/metrics)", line):
            break
    else:
        pytest.fail("the run ended by itself")
    assert continued
    served = urllib.request.urlopen(match[1], timeout=30).read().decode()
    assert 'autopainter_images_total{run="quickstart-32"}' in served
    os.killpg(program.pid, signal.SIGINT)
    rest = program.communicate(timeout=PATIENCE_SECONDS)[0]
    assert program.returncode == 130, rest
    assert "the same command continues" in rest
    assert processes(marker) == []
    stopped = re.search(r"stopped at the checkpoint of step (\d+)", rest)
    assert stopped, rest

    program = quickstart(folder, "--steps", str(int(stopped[1]) + 10), "--keep-running")
    output = program.communicate(timeout=PATIENCE_SECONDS)[0]
    assert program.returncode == 0, output
    assert "already packed" in output
    assert "already there" in output
    assert f"from its checkpoint of step {stopped[1]}" in output
    board = next(line.split()[-1] for line in output.splitlines() if line.startswith("TensorBoard:"))
    until(
        lambda: json.load(urllib.request.urlopen(f"{board}/data/runs", timeout=30)) == ["quickstart-32/events"],
        seconds=60,
    )
    assert len(processes(marker)) >= 2

    program = quickstart(folder, "--stop")
    output = program.communicate(timeout=PATIENCE_SECONDS)[0]
    assert program.returncode == 0, output
    assert processes(marker) == []
