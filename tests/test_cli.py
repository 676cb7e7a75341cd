"""The command line as a user meets it: help, dry run, and one line with exit code 2 for every kind of bad input.

The real programs run in processes of their own, but for the many kinds of bad input. Run: pytest tests/test_cli.py
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import boto3
import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from services import SeaweedFS
from waiting import PATIENCE_SECONDS

import job.train
from autopainter import cli
from autopainter.config import Config
from autopainter.storage import open_store
from autopainter.storage.s3 import shared_client

AUTOPAINTER = [str(Path(sys.executable).parent / "autopainter")]
JOB = [sys.executable, "job/train.py"]


def call(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def sets(settings: list[str]) -> list[str]:
    return [option for setting in settings for option in ("--set", setting)]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("# everything is set on the command line\n{}\n")
    return path


def objects(uri: str) -> list[str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [entry["Key"] for entry in listed.get("Contents", [])]


@pytest.mark.parametrize(
    "command",
    [
        [*AUTOPAINTER, "--help"], [*AUTOPAINTER, "train", "--help"], [*AUTOPAINTER, "pack", "--help"],
        [*AUTOPAINTER, "pack", "images", "--help"], [*AUTOPAINTER, "paint", "--help"], [*JOB, "--help"],
    ],
    ids=lambda command: " ".join(command[1:]),
)  # fmt: skip
def test_help_names_every_option_in_readable_width(command: list[str]) -> None:
    done = call(command)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage:")
    assert max(map(len, done.stdout.splitlines())) <= 110


@pytest.mark.parametrize("program", [[*AUTOPAINTER, "train"], JOB], ids=["autopainter", "job"])
def test_dry_run_prints_the_resolved_config_and_writes_nothing(
    program: list[str], config_file: Path, small_settings: list[str], runs_uri: str, tmp_path: Path
) -> None:
    options = ["--config", str(config_file), *sets([*small_settings, "train.steps=7"]), "--dry-run"]
    done = call([*program, *options], AUTOPAINTER__TRAIN__SEED="5")
    assert done.returncode == 0, done.stderr
    assert f"# trains {runs_uri}/small" in done.stdout
    assert "  steps: 7\n" in done.stdout
    assert "  seed: 5\n" in done.stdout
    assert objects(runs_uri) == []
    printed = tmp_path / "resolved.yaml"
    printed.write_text(done.stdout)
    again = call([*program, "--config", str(printed), "--dry-run"])
    assert again.stdout == done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_train_command_saves_and_says_how_to_go_on(
    config_file: Path, small_settings: list[str], number: int, code: int
) -> None:
    options = sets([*small_settings, "train.steps=100000", "checkpoint.every_seconds=60"])
    program = subprocess.Popen(
        [*AUTOPAINTER, "train", "--config", str(config_file), *options], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert program.stderr is not None
    for line in program.stderr:
        if "step 1/" in line:
            break
    program.send_signal(number)
    rest = program.stderr.read()
    assert program.wait(timeout=PATIENCE_SECONDS) == code
    assert re.search(r"stopped after step \d+; the same command continues$", rest.strip())
    assert re.search(r"checkpoint of step \d+ saved", rest)
    assert "Traceback" not in rest


@pytest.mark.parametrize("program", [[*AUTOPAINTER, "train"], JOB], ids=["autopainter", "job"])
def test_a_run_that_exists_is_refused_on_demand(
    program: list[str], config_file: Path, small_settings: list[str], small: Config
) -> None:
    open_store(small.run.uri).write("checkpoints/00000007.json", b"{}")
    done = call([*program, "--config", str(config_file), *sets(small_settings), "--resume", "none"])
    assert done.returncode == 2
    assert f"--resume none: the run {small.run.uri} exists, its newest checkpoint is of step 7" in done.stderr
    assert "Traceback" not in done.stderr
    done = call([*program, "--config", str(config_file), *sets(small_settings), "--overwrite"])
    assert (done.returncode, "only with --resume none" in done.stderr) == (2, True)
    assert [entry.key for entry in open_store(small.run.uri).list()] == ["checkpoints/00000007.json"]


@pytest.mark.parametrize("program", [AUTOPAINTER, [sys.executable, "-m", "autopainter"]], ids=["script", "module"])
def test_ctrl_c_during_the_imports_is_one_line(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("print('importing', flush=True)\ninput()\n")  # an import that takes long
    process = subprocess.Popen(
        [*program, "--version"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, said) == (130, "\nautopainter: stopped; the same command continues\n")


def bad_version(s3_uri: str, dataset: str) -> str:
    client = boto3.client("s3")
    bucket, _, key = dataset.removeprefix("s3://").partition("/")
    document = json.loads(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    uri = f"{s3_uri}/manifest.json"
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    client.put_object(Bucket=bucket, Key=key, Body=json.dumps(document | {"version": 99}).encode())
    return uri


def train_here(*options: str) -> int:
    return cli.exit_code_of(lambda: cli.cli.main(["train", *options], standalone_mode=False), "autopainter")


def job_here(*options: str) -> int:
    return cli.exit_code_of(lambda: job.train.train.main([*options], standalone_mode=False), "job/train.py")


@pytest.mark.parametrize("program", [train_here, job_here])
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("missing bucket of the data", "there is no bucket 'nowhere'"),
        ("missing bucket of the run", "there is no bucket 'nowhere'"),
        ("missing manifest", "data.manifest: s3://datasets/none/manifest.json: not found"),
        ("folder of the manifest", "is a folder, not a file; name the manifest.json that"),
        ("manifest of another version", "format version 99"),
        ("wrong credentials", "refused the credentials"),
        ("unknown field", "unknown field; did you mean train.steps?"),
        ("wrong type", "train.global_batch: input should be a valid integer"),
        ("indivisible batch", "nearest right values: 4 or 8"),
        ("wrong checksum", "loss.vgg_weights"),
        ("missing config file", "cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    program: Callable[..., int], case: str, said: str, config_file: Path, small_settings: list[str], runs_uri: str,
    s3_uri: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changes = {
        "missing bucket of the data": ["data.manifest=s3://nowhere/manifest.json"],
        "missing bucket of the run": ["run.storage=s3://nowhere"],
        "missing manifest": ["data.manifest=s3://datasets/none/manifest.json"],
        "folder of the manifest": [f"data.manifest={tmp_path}"],
        "manifest of another version": [f"data.manifest={bad_version(s3_uri, dataset)}"],
        "unknown field": ["train.stepz=3"],
        "wrong type": ["train.global_batch=many"],
        "indivisible batch": ["train.global_batch=7", "cluster.workers=4"],
        "wrong checksum": [f"loss.vgg_sha256={'0' * 64}"],
    }.get(case, [])
    path = tmp_path / "none.yaml" if case == "missing config file" else config_file
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # no cluster may be asked before the input is known to be good
        if case == "wrong credentials":
            patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
            patch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the credentials that it found first
            shared_client.cache_clear()
        if case == "indivisible batch" and program is train_here:
            patch.setenv("WORLD_SIZE", "4")
        assert program("--config", str(path), *sets(small_settings + changes)) == 2
    shared_client.cache_clear()
    errors = capfd.readouterr().err
    assert said in errors
    assert len(errors.splitlines()) == 1
    assert "wrong-secret" not in errors
    assert objects(runs_uri) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_gpus_that_are_wanted_where_there_are_none_are_one_line_and_exit_code_2(
    config_file: Path, small_settings: list[str], runs_uri: str
) -> None:
    settings = sets([*small_settings, "cluster.gpus=true"])
    done = call([*AUTOPAINTER, "train", "--config", str(config_file), *settings])
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "cluster.gpus: true, but torch finds no GPU here" in line
    assert objects(runs_uri) == []


@pytest.mark.parametrize("program", [[*AUTOPAINTER, "train"], JOB], ids=["autopainter", "job"])
def test_a_read_only_disk_is_one_line_and_exit_code_2(
    program: list[str], config_file: Path, small_settings: list[str], small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    settings = sets([*small_settings, f"run.storage={small_disk}"])
    done = call([*program, "--config", str(config_file), *settings])
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert f"{small_disk}/small/attempts/preflight: cannot be written: Read-only file system" in line


def test_a_dry_run_of_packing_says_what_it_would_do(pictures: Path, s3_uri: str) -> None:
    done = call([*AUTOPAINTER, "pack", "images", str(pictures), s3_uri, "--size", "32", "--dry-run"])
    assert done.returncode == 0, done.stderr
    assert "kind: color-images" in done.stdout
    assert f"# packs 90 inputs into 2 shards in {s3_uri}" in done.stdout
    assert objects(s3_uri) == []


def test_an_empty_folder_cannot_be_packed(tmp_path: Path, s3_uri: str) -> None:
    (tmp_path / "empty").mkdir()
    done = call([*AUTOPAINTER, "pack", "images", str(tmp_path / "empty"), s3_uri])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no pictures in it" in done.stderr
    assert objects(s3_uri) == []


def test_credentials_are_nowhere_in_what_a_run_stores_or_says(
    s3: SeaweedFS, config_file: Path, small_settings: list[str], runs_uri: str
) -> None:
    done = call([*AUTOPAINTER, "train", "--config", str(config_file), *sets([*small_settings, "train.steps=2"])])
    assert done.returncode == 0, done.stderr
    secret = s3.env["AWS_SECRET_ACCESS_KEY"]
    client = boto3.client("s3")
    stored = objects(runs_uri)
    assert any(key.endswith("weights.safetensors") for key in stored)
    for key in stored:
        assert secret.encode() not in client.get_object(Bucket="runs", Key=key)["Body"].read()
    assert secret not in done.stdout + done.stderr


def test_a_place_whose_name_is_no_text_is_printed(pictures: Path, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"\xe4")
    options = ["--size", "32", "--workers", "1"]
    done = call([*AUTOPAINTER, "pack", "images", str(pictures), str(place), *options], PYTHONIOENCODING="utf-8:strict")
    assert (done.returncode, done.stdout.startswith(rf"{tmp_path}/\udce4/manifest.json: ")) == (0, True)


@pytest.mark.parametrize(
    "work",
    [
        lambda: bytes(1 << 60),
        lambda: np.empty(1 << 60, np.uint8),
        lambda: torch.empty(1 << 60, dtype=torch.uint8),
        lambda: cv2.copyMakeBorder(np.zeros((1, 1), np.uint8), 0, 1 << 28, 0, 1 << 30, cv2.BORDER_CONSTANT),
    ],
    ids=["python", "numpy", "torch", "opencv"],
)
def test_memory_that_runs_out_is_one_line(work: Callable[[], object], capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> object:
        import autopainter.paint  # noqa: F401 - as a command does that needs torch

        return work()

    assert cli.exit_code_of(command, "autopainter") == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("autopainter: too little memory: ")
