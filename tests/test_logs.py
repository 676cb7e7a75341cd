"""What a training program says: lines for people, JSON for machines, a bar on a terminal.

What the job's driver says of its workers is in test_job.py and test_job_submit.py.

Run: pytest tests/test_logs.py
"""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray._private.worker
from waiting import PATIENCE_SECONDS

from autopainter import logs
from autopainter.progress import TrainingProgress
from job.logs import forward_as

PROGRESS = TrainingProgress(
    attempt=1, step=50, steps=3000, images_per_second=57.04, data_wait=0.012, generator_loss=12.7, pixel_loss=0.11,
    discriminator_loss=0.36, checkpoint_age=41.2, seconds_left=3675,
)  # fmt: skip


@pytest.fixture
def train(small_settings: list[str], tmp_path: Path) -> list[str]:
    """A command that trains six steps in one process."""
    config = tmp_path / "empty.yaml"
    config.write_text("{}")
    settings = [*small_settings, f"run.storage={tmp_path}", "train.steps=6", "telemetry.log_every_steps=1"]
    options = [option for setting in settings for option in ("--set", setting)]
    return [str(Path(sys.executable).parent / "autopainter"), "train", "--config", str(config), *options]


def records(text: str) -> list[dict[str, object]]:
    """The lines of a JSON log, each of which must be an object."""
    return [json.loads(line) for line in text.splitlines()]


def steps(log: list[dict[str, object]]) -> list[object]:
    return [record["step"] for record in log if "step" in record]


def test_a_progress_line_tells_speed_losses_and_times() -> None:
    assert str(PROGRESS) == (
        "step 50/3000  57.0 images/s  waited 1%  G 12.700  L1 0.1100  D 0.360  checkpoint 41 s old  1:01:15 left"
    )


def test_elsewhere_than_on_a_terminal_there_are_plain_lines(train: list[str]) -> None:
    done = subprocess.run(train, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert (done.returncode, done.stdout) == (0, "")
    assert re.findall(r"^\d\d:\d\d:\d\d step (\d)/6 ", done.stderr, re.MULTILINE) == list("123456")
    assert "\x1b" not in done.stderr


def test_json_has_a_field_for_each_value(train: list[str]) -> None:
    done = subprocess.run([*train, "--log-format", "json"], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    log = records(done.stderr)
    assert steps(log) == [1, 2, 3, 4, 5, 6]
    last = next(record for record in log if record.get("step") == 6)
    assert {"time", "level", "logger", "message", "images_per_second", "checkpoint_age"} <= last.keys()
    assert not {"args", "msg", "created", "process"} & last.keys()


def test_an_error_is_json_too(train: list[str]) -> None:
    command = [*train, "--log-format", "json", "--set", "data.manifest=/nowhere/manifest.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 2
    (error,) = records(done.stderr)
    assert error["level"] == "ERROR"
    assert "data.manifest: /nowhere/manifest.json: not found" in str(error["message"])


def test_on_a_terminal_there_is_a_bar_below_the_log(train: list[str]) -> None:
    ours, theirs = pty.openpty()
    program = subprocess.Popen(train, stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "150"})
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1 << 16):
            shown += part
    except OSError:  # how a terminal ends
        pass
    os.close(ours)
    assert program.wait(timeout=PATIENCE_SECONDS) == 0
    text = shown.decode()
    assert re.search(r"step\b.*━.*6/6.*images/s.*checkpoint \d+ s old.*0:00 left", text)
    assert re.search(r"\d\d:\d\d:\d\d checkpoint of step 6 saved\r?\n", text)
    assert not re.search(r"\d\d:\d\d:\d\d step \d/6 ", text)


def test_a_line_of_another_process_becomes_json() -> None:
    assert json.loads(logs.as_json("Fatal Python error", pid=7)) == {"message": "Fatal Python error", "pid": 7}
    assert json.loads(logs.as_json('{"message": "a", "step": 3}', pid=7)) == {"message": "a", "step": 3, "pid": 7}
    assert json.loads(logs.as_json("12", pid=7)) == {"message": "12", "pid": 7}


def test_of_the_autoscaler_only_what_happened_is_forwarded(monkeypatch, capsys):
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", ray._private.worker.print_to_stdstream)
    monkeypatch.setattr("ray.autoscaler.v2.utils.is_autoscaler_v2", lambda: False)  # it asks the cluster
    forward_as("json")
    lines = ["======== Autoscaler status ========", ":event_summary:Adding 1 node(s) of type gpu."]
    for pid, said in (("autoscaler", lines[1:]), ("7", lines)):
        ray._private.worker.print_to_stdstream({"pid": pid, "ip": "h", "lines": lines, "is_err": False}, False)
        messages = [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
        assert [message for message in messages if "Tip" not in message] == [
            line.removeprefix(":event_summary:") if pid == "autoscaler" else line for line in said
        ]
