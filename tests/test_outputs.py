"""Places that a command is told to write to: which are refused, in one line, and that looking leaves nothing there.

Run: pytest tests/test_outputs.py
"""

import subprocess
from pathlib import Path

import pytest
from painting import refusal

from autopainter.outputs import check_file, check_png


def test_places_where_a_file_can_be_made_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_text("mine")
    (tmp_path / "link.png").symlink_to("nowhere")
    for name in ("new.png", "new/folder/x.png", "there.png", "link.png", "NEW.PNG", "out?token=1/x.png"):
        check_png(tmp_path / name, "--sheet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.png", "there.png"]
    assert (tmp_path / "there.png").read_text() == "mine"


def test_a_relative_place_is_looked_for_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    check_file(Path("new"), "-o")
    refusal(lambda: check_file(Path("file/new"), "-o"), "-o: file/new")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("folder.png", "must be a file, not a folder"),
        ("file/x.png", "Not a directory"),
        ("file/below/x.png", "Not a directory"),
        ("link/x.png", "no file can be made in"),
        ("/proc/none/x.png", "no file can be made in /proc"),
        (f"{'x' * 300}.png", "File name too long"),
        ("sheet.jpg", "must be a .png file"),
        ("sheet", "must be a .png file"),
    ],
)
def test_a_bad_place_is_named_with_its_option(tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    refusal(lambda: check_png(tmp_path / place, "--sheet"), f"--sheet: {tmp_path / place}: ", said)


def test_a_read_only_disk_is_noticed(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refusal(lambda: check_file(small_disk / "new" / "x.png", "-o"), f"in {small_disk}: Read-only file system")
