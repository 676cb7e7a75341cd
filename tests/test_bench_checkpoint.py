"""The benchmark of checkpoints, end to end at a small size; what it measures there means nothing.

Run: pytest tests/test_bench_checkpoint.py
"""

import json
import subprocess
import sys

from conftest import ROOT
from waiting import PATIENCE_SECONDS

METHODS = ["ours-folder", "ours-s3", "save", "save-upload", "report", "report-async"]


def test_every_method_is_measured_and_shown(tmp_path):
    values = tmp_path / "values.json"
    options = ["--size", "32", "--width", "4", "--steps", "2", "--rounds", "1", "--checkpoints", "2"]
    command = [sys.executable, str(ROOT / "scripts/bench_checkpoint.py"), *options, "--json", str(values)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(values.read_text())
    assert found["not_measured"] == {}
    assert [row["method"] for row in found["rows"]] == METHODS
    assert all(len(row["stall_ms"]) == len(row["durable_s"]) == 2 for row in found["rows"])
    assert len([line for line in done.stdout.splitlines() if line.startswith("| ")]) == 2 + len(METHODS)
