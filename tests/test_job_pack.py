"""Packing on a real Ray cluster: the bytes of a local pack, whatever is killed.

Run: pytest tests/test_job_pack.py
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from waiting import PATIENCE_SECONDS

from autopainter import storage
from autopainter.data import pack, sources

pytestmark = pytest.mark.usefixtures("ray")

OPTIONS = ["--size", "96", "--shard-samples", "32", "--validation", "0.1", "--jitter", "0.5"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "job/pack.py", "images", *arguments, *OPTIONS]


def contents(uri: str) -> dict[str, bytes]:
    store = storage.open_store(uri)
    return {entry.key: store.read(entry.key) for entry in store.list()}


@pytest.fixture(scope="module")
def many(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 900 pictures: enough for shards that are still being made when the first one is finished."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(10):
        for path in pictures.iterdir():
            (folder / f"{number}-{path.name}").write_bytes(path.read_bytes() + bytes(number))
    return folder


@pytest.fixture(scope="module")
def expected(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a local pack makes of it."""
    folder = tmp_path_factory.mktemp("expected")
    source = sources.ColorImages(str(many), size=96, jitter=0.5)
    pack.pack(source, str(folder), pack.PackOptions(shard_samples=32, validation=0.1), workers=1)
    return contents(str(folder))


def start(many: Path, uri: str) -> subprocess.Popen[str]:
    """Start packing; returns when the first shard is finished."""
    process = subprocess.Popen(
        command(str(many), uri), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    store = storage.open_store(uri)
    while not any(entry.key.endswith(".tar.json") for entry in store.list("_pack/")):
        assert process.poll() is None, process.communicate()
    return process


def title(folder: Path) -> bytes:
    """The command line of a process, as Ray sets it; empty if it has just ended."""
    try:
        return (folder / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_killed_worker_is_replaced_and_the_bytes_are_those_of_a_local_pack(many, expected, s3_uri):
    process = start(many, s3_uri)
    killed = False
    while not killed:  # a worker is busy most of the time
        assert process.poll() is None
        for folder in Path("/proc").glob("[0-9]*"):
            if b"ray::_call" in title(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(folder.name), signal.SIGKILL)
                    killed = True
                    break
    output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert "0 broken" in output
    assert contents(s3_uri) == expected


def test_a_killed_driver_leaves_no_manifest_and_the_same_command_continues(many, expected, s3_uri):
    process = start(many, s3_uri)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert storage.open_store(s3_uri).size("manifest.json") is None
    done = subprocess.run(
        command(str(many), s3_uri), cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert contents(s3_uri) == expected
    again = subprocess.run(
        command(str(many), s3_uri), cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE_SECONDS
    )
    assert "already packed" in again.stdout


def test_what_the_user_must_mend_is_one_line(many):
    done = subprocess.run(
        command(str(many), "s3://no-such-bucket/x"), cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 2
    assert re.fullmatch(r"job/pack.py: .*no bucket 'no-such-bucket'.*\n", done.stderr)
    unreachable = subprocess.run(
        command(str(many), "s3://datasets/never"), cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE_SECONDS,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:9"},
    )  # fmt: skip
    assert unreachable.returncode == 2
    assert "RAY_ADDRESS" in unreachable.stderr.splitlines()[-1]


def test_a_cluster_that_is_gone_is_not_waited_for(pictures, s3_uri):
    """A cluster that was killed leaves its address on the machine, and Ray tries for minutes to reach it."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # short: Ray's sockets lie in it
        left = Path(folder, "ray/ray_current_cluster")
        left.parent.mkdir()
        left.write_text("127.0.0.1:9")
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_TMPDIR": folder}
        done = subprocess.run(
            command(str(pictures), s3_uri), cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE_SECONDS, env=env
        )
        assert done.returncode == 0, done.stderr
        assert "the Ray cluster that ran on this machine, at 127.0.0.1:9, is gone: starting one" in done.stderr
        assert not left.exists()
        left.write_text("127.0.0.1:9")
        assert storage.open_store(s3_uri).size("manifest.json")
        asked = subprocess.run(
            command(str(pictures), f"{s3_uri}-again"), cwd=ROOT, text=True, capture_output=True,
            timeout=PATIENCE_SECONDS, env=env | {"RAY_ADDRESS": "auto"},
        )  # fmt: skip
        assert asked.returncode == 2
        assert "RAY_ADDRESS: no Ray cluster answers at auto" in asked.stderr
