"""A run on two workers from which everything that can be killed is killed: it ends as an undisturbed one.

Ten faults of ``scripts/chaos.py`` with a fixed seed, each kind at least once. What must hold of the run is checked by
the script itself; the reference is a run of the same configuration that nobody touched.
Run: pytest tests/test_chaos_run.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chaos
import chaos_checks
import pytest
from conftest import ROOT
from faulty_proxy import FaultyProxy
from services import RayNode, SeaweedFS
from waiting import PATIENCE_SECONDS

SCRIPT = (sys.executable, str(ROOT / "scripts/chaos.py"))


def test_ten_faults_change_nothing(tmp_path: Path) -> None:
    options = ("--kills", "10", "--seed", "1", "--folder", str(tmp_path / "run"), "--json", str(tmp_path / "result"))
    done = subprocess.run([*SCRIPT, *options], capture_output=True, text=True, timeout=4 * PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result").read_text())
    assert len(result["kills"]) == 10
    kinds = {kill["kind"] for kill in result["kills"]}
    assert kinds == set(chaos.KINDS) - (set() if RayNode.can_mount() else {"memory"})
    for kill in result["kills"]:
        if kill["kind"] == "sigterm":  # it saves before it ends
            assert (kill["lost"], kill["details"]) == (0, "exit code 143")


def test_the_script_leaves_no_process_when_it_is_stopped(tmp_path: Path) -> None:
    with subprocess.Popen([*SCRIPT, "--folder", str(tmp_path)], stdout=subprocess.PIPE, text=True) as script:
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not (tmp_path / "logs/chaos-001.log").exists():
                assert time.monotonic() < deadline
                assert script.poll() is None
                time.sleep(0.1)
            mark = f"{chaos_checks.MARK}=".encode()
            environment = next(
                entry for path in Path("/proc").glob("[0-9]*") for entry in entries_of(path, "environ")
                if entry.startswith(mark) and str(tmp_path).encode() in b" ".join(entries_of(path, "cmdline"))
            )  # fmt: skip
            token = environment.removeprefix(mark).decode()
            assert chaos_checks.left_over(token)
            script.send_signal(signal.SIGTERM)
            assert script.wait(timeout=PATIENCE_SECONDS) == 128 + signal.SIGTERM
            assert chaos_checks.left_over(token) == []
        finally:
            script.kill()


def entries_of(process: Path, name: str) -> list[bytes]:
    """The entries of a process's ``environ`` or ``cmdline``; none if it ended."""
    try:
        return (process / name).read_bytes().split(b"\0")
    except OSError:
        return []


def test_an_order_holds_each_kind_about_equally_often_and_follows_from_the_seed() -> None:
    orders = [chaos.order_of(list(chaos.KINDS), 25, chaos.random.Random(seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    counts = [orders[0].count(kind) for kind in chaos.KINDS]
    assert sum(counts) == 25
    assert max(counts) - min(counts) <= 1


def test_a_proxy_that_is_down_answers_503_to_every_request_and_passes_none_on(s3: SeaweedFS) -> None:
    with FaultyProxy(s3.endpoint) as proxy:
        code = (
            "import boto3, botocore.config, botocore.exceptions as e\n"
            "config = botocore.config.Config(s3={'addressing_style': 'path'}, retries={'total_max_attempts': 1})\n"
            "client = boto3.client('s3', config=config)\n"
            "def code(call, **more):\n"
            "    try:\n"
            "        call(Bucket='runs', Key='down', **more)\n"
            "    except e.ClientError as error:\n"
            "        return error.response['ResponseMetadata']['HTTPStatusCode']\n"
            "print(code(client.put_object, Body=b'1'), code(client.get_object), code(client.head_object),"
            " code(client.delete_object))\n"
        )
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url}
        client = s3.client()
        client.put_object(Bucket="runs", Key="down", Body=b"0")
        proxy.down = True
        asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert asked.stdout.split() == ["503"] * 4, asked.stderr
        assert proxy.injected == {"down": 4}
        assert client.get_object(Bucket="runs", Key="down")["Body"].read() == b"0"
        proxy.down = False
        asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert asked.stdout.split() == ["None"] * 4, asked.stderr


@pytest.mark.parametrize("arguments", [("--kinds", "rank,flood"), ("--kills", "0")])
def test_bad_arguments_are_named(arguments: tuple[str, str]) -> None:
    done = subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{arguments[0]}: " in done.stderr
