"""scripts/processes.py: a child process is gone when it should be, whatever happens to who started it."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import processes
import pytest
from processes import Service, ServiceError, stop_recorded
from waiting import until

MARK = "AUTOPAINTER_TEST"
HERE = Path(__file__).parent


class Pair(Service):
    """A shell with a child."""

    kind = "pair"
    line = 'sleep 1000 & : > "$0/up"; wait'

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        self.folder = self._scratch()
        return ["sh", "-c", self.line, str(self.folder)], {}, self.folder / "log"

    def _probe(self) -> None:
        if not (self.folder / "up").exists():
            raise FileNotFoundError("up")


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """What tells this test's processes from others: they inherit it in their environment."""
    monkeypatch.setenv(MARK, token := secrets.token_hex(8))
    return token


def marked(mark: str) -> list[int]:
    """The pids of those that run; a zombie has no environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def test_it_comes_and_goes_with_its_descendants_and_files(mark: str) -> None:
    with Pair(detach=False) as pair:
        assert len(marked(mark)) == 2
        until(lambda: len(pair.pids("sleep")) == 1)  # a fork has the name of the shell until it is a program
    assert marked(mark) == []
    assert not pair.folder.exists()


def test_one_that_does_not_come_up_is_removed_and_shows_its_log(mark: str) -> None:
    pair = Pair(detach=False)
    pair.line = "sleep 1000 & echo no socket left; exit 3"
    with pytest.raises(ServiceError, match=r"pair ended with code 3(?s:.*)no socket left"):
        pair.start()
    assert marked(mark) == []
    assert not pair.folder.exists()


def test_a_signal_in_the_middle_of_a_start_leaves_nothing(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Popen(subprocess.Popen[bytes]):
        """Sends the signal when the child runs, and before anybody but the thread that forks it knows."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            assert marked(mark)
            interrupted.clear()
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda: interrupted)

    interrupted: list[int] = []

    def interrupt(signum: int, _: object) -> None:
        interrupted.append(signum)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.subprocess, "Popen", Popen)
    before = signal.signal(signal.SIGINT, interrupt)
    pair = Pair(detach=False)
    try:
        with pytest.raises(KeyboardInterrupt):
            pair.start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert marked(mark) == []
    assert not pair.folder.exists()
    pair.stop()  # there is nothing to stop


STARTER = """
import pathlib, sys, time
sys.path[:0] = [{scripts!r}, {tests!r}]
from test_processes import Pair

pair = Pair(detach={detach}).start()
pair.record(pathlib.Path({file!r}))
print(pair.pid, pair.folder, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("detach", [False, True])
def test_what_a_killed_process_left_is_ended_from_its_record(mark: str, detach: bool, tmp_path: Path) -> None:
    scripts, tests, file = (str(place) for place in (Path(processes.__file__).parent, HERE, tmp_path / "pids"))
    code = STARTER.format(scripts=scripts, tests=tests, detach=detach, file=file)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout
        pid, folder = starter.stdout.readline().split()
        starter.kill()
    if detach:
        assert int(pid) in marked(mark)
    else:
        until(lambda: int(pid) not in marked(mark))
        assert len(marked(mark)) == 1  # its child, an orphan
    assert stop_recorded(tmp_path / "pids") == ["pair"]
    assert marked(mark) == []
    assert not Path(folder).exists()
    assert stop_recorded(tmp_path / "pids") == []


def test_a_pid_that_was_given_again_is_left_alone(mark: str, tmp_path: Path) -> None:
    with Pair(detach=False) as pair:
        pair.record(tmp_path / "pids")
        handle = json.loads((tmp_path / "pids").read_text())
        (tmp_path / "pids").write_text(json.dumps({**handle, "started": handle["started"] - 1, "marker": "another"}))
        assert stop_recorded(tmp_path / "pids") == []
        assert len(marked(mark)) == 2
