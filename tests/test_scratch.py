"""Temporary folders of living and of killed processes. Run: pytest tests/test_scratch.py"""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from autopainter.scratch import ScratchFolder

HOLD = """
import sys
from autopainter.scratch import ScratchFolder
folder = ScratchFolder("test")
(folder.path / "file").write_text("x")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(place: Path) -> None:
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    dead, alive = (Path(holder.stdout.readline().strip()) for holder in holders if holder.stdout)
    other = place / "autopainter-other-1"
    other.mkdir()
    holders[0].kill()
    holders[0].wait()
    mine = ScratchFolder("test")
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()
    (mine.path / "a").write_text("x")
    mine.remove()
    holders[1].communicate("")
    assert {path.name for path in place.iterdir()} == {alive.name, other.name}
