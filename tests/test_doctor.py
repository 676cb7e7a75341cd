"""The doctor against real parts, well and ill: a real S3 server, a real Ray head that wants a token, full disks.

Each fault is made for real where that can be done; an HTTP server in between plays what the S3 server would not do.
Every case asserts the row, what to do, and the exit code. Run: pytest tests/test_doctor.py
"""

import contextlib
import email.utils
import http.client
import http.server
import json
import os
import pty
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import torch
from conftest import Done
from processes import HOST, free_ports
from services import RayCluster, SeaweedFS
from waiting import PATIENCE_SECONDS

from autopainter.doctor import gpus, machine, versions
from autopainter.storage import open_store
from autopainter.storage.s3 import shared_client

PROGRAM = Path(sys.executable).parent / "autopainter"
STEPS = ("answers", "clock", "write", "read", "ranges", "conditional put", "list", "large object", "delete")
SECONDS = 10  # of --timeout, where something does not answer

Rows = dict[str, dict[str, str]]
Report = Callable[..., tuple[int, Rows]]


@pytest.fixture(autouse=True)
def _no_cluster_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def report(call: Callable[..., Done]) -> Report:
    """Run the doctor; exit code and rows by the name of the check. It says nothing on stderr, whatever it finds."""

    def run(*options: object) -> tuple[int, Rows]:
        done = call("doctor", "--json", *options)
        assert done.stderr == ""
        document = json.loads(done.stdout)
        rows = {row["check"]: row for row in document["checks"]}
        assert len(rows) == len(document["checks"])
        assert document["failed"] == sum(row["result"] == "failed" for row in rows.values())
        assert all(row["advice"] for row in rows.values() if row["result"] in ("failed", "warning"))
        return done.returncode, rows

    return run


@pytest.fixture
def aws(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets AWS_* variables, or removes those that are None, for a client of their own."""

    def change(**variables: str | None) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the credentials that it found first
        shared_client.cache_clear()

    yield change
    shared_client.cache_clear()


def sets(settings: list[str]) -> list[str]:
    return [option for setting in settings for option in ("--set", setting)]


def everything(*uris: str) -> list[str]:
    """Keys and sizes of all objects, and the uploads that nobody finished."""
    return [f"{uri}/{entry.key} {entry.bytes}" for uri in uris for entry in open_store(uri).list()] + [
        str(upload)
        for uri in uris
        for upload in shared_client().list_multipart_uploads(Bucket=uri.removeprefix("s3://")).get("Uploads", [])
    ]


# A machine


def test_a_machine_alone_is_fine_and_plain_lines_say_so() -> None:
    done = subprocess.run([PROGRAM, "doctor"], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    *lines, total = done.stdout.splitlines()
    names = {line[9:40].strip() for line in lines} - {""}
    expected = {"Python", "packages", "processor", "memory", "shared memory", "temporary folder", "clock", "GPUs"}
    assert names >= expected
    assert total.startswith("0 FAILED, ")


def test_a_terminal_shows_a_table() -> None:
    main, side = pty.openpty()
    environment = {**os.environ, "COLUMNS": "160", "TERM": "xterm"}
    program = subprocess.Popen([PROGRAM, "doctor"], stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the program has closed its end
        while piece := os.read(main, 65536):
            shown += piece
    os.close(main)
    assert program.wait(timeout=PATIENCE_SECONDS) == 0
    assert all(word in shown.decode() for word in ("what to do", "shared memory", "\x1b[", "0 FAILED"))


def test_a_temporary_folder_that_cannot_be_written(
    report: Report, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_disk / "full").write_bytes(bytes(1 << 20))
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    code, rows = report()
    row = rows["temporary folder"]
    assert (code, row["result"]) == (1, "failed")
    assert "No space left on device" in row["detail"]
    assert f"writable for uid {os.getuid()} and free space in it, or set TMPDIR" in row["advice"]


def test_small_shared_memory_is_a_warning(small_disk: Path, tmp_path: Path) -> None:
    for path in (small_disk, tmp_path / "none"):
        found = machine.shared_memory(str(path))
        assert found.result == "warning"
        assert "--shm-size=2g, or an emptyDir with medium: Memory" in found.advice


def test_other_packages_than_the_tested_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.packages().result == "ok"
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\nclick==0.1\ntorch==1.0\n")
    monkeypatch.setattr(versions, "_CONSTRAINTS", pins)
    found = versions.packages()
    assert found.result == "warning"
    assert "(tested: 0.1), torch " in found.detail
    assert "pip install -c constraints.txt -e ." in found.advice
    required = ["click>=99", "nothing-of-this-name>=1", "ray==0.1; extra == 'ray'", "other==1; extra == 'dev'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: required)
    found = versions.packages()
    assert found.result == "failed"
    assert "(needed: >=99), nothing-of-this-name is missing, ray " in found.detail
    assert "other" not in found.detail


def test_a_product_of_this_machine_is_right_and_a_wrong_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    assert all(gpus.product_is_right(torch.device(device)) for device in devices)
    right = torch.Tensor.to
    for spoil in (float("nan"), 3.0):

        def to(tensor: torch.Tensor, *arguments: Any, spoil: float = spoil) -> torch.Tensor:
            moved = right(tensor, *arguments)
            return moved.index_fill(0, torch.tensor([7]), spoil)

        monkeypatch.setattr(torch.Tensor, "to", to)
        assert not gpus.product_is_right(torch.device("cpu"))


def test_a_fault_of_one_check_hides_no_other_and_shows_no_secret(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(config: object) -> Iterator[None]:
        yield from ()
        raise KeyError("hidden-secret at http://user:password@host/")

    monkeypatch.setattr(machine, "check", broken)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hidden-secret")
    code, rows = report("--storage", tmp_path)
    assert code == 1
    assert rows["machine"]["detail"] == "KeyError: '*** at http://***@host/'"
    assert "report it" in rows["machine"]["advice"]
    assert rows[f"{tmp_path}: delete"]["result"] == "ok"


# What a configuration names


def test_everything_that_a_run_needs_is_there(
    report: Report, small_settings: list[str], runs_uri: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 3}\n")
    before = everything("s3://runs", "s3://datasets")
    cache = tmp_path / "deep" / "cache"
    more = [f"data.cache={cache}", "data.cache_gib=0.001"]
    code, rows = report("--config", path, *sets(small_settings + more), "--storage", runs_uri)
    assert code == 0, rows
    for place in ("run.storage", runs_uri):
        assert {name: rows[f"{place}: {name}"]["result"] for name in STEPS} == dict.fromkeys(STEPS, "ok")
    named = ["data.manifest", "data.manifest: shards", "data.manifest: train", "data.manifest: validation"]
    assert {rows[name]["result"] for name in [*named, "loss.vgg_weights", "workers", "data.cache"]} == {"ok"}
    assert "train 84, validation 6 samples" in rows["data.manifest"]["detail"]
    assert "48x48, checksum right" in rows["data.manifest: train"]["detail"]
    assert everything("s3://runs", "s3://datasets") == before
    assert not cache.parent.exists()


def test_lines_say_the_same_as_json(report: Report, call: Callable[..., Done], small_settings: list[str]) -> None:
    options = sets([*small_settings, "train.global_batch=7"])
    code, rows = report(*options)
    done = call("doctor", *options)
    assert (code, done.returncode) == (1, 1)
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert [line[9:39].strip() for line in lines[:-1] if line[:8].strip()] == [name[:30] for name in rows]
    place = next(number for number, line in enumerate(lines) if line.startswith("FAILED   workers "))
    assert rows["workers"]["detail"] in lines[place]
    assert lines[place + 1].strip() == f"-> {rows['workers']['advice']}"
    assert lines[-1].startswith("1 FAILED, ")


@pytest.mark.parametrize(
    ("change", "check", "detail", "advice"),
    [
        (
            "train.global_batch=7",
            "workers",
            "7 is not divisible by cluster.workers 2",
            "the values that the detail names",
        ),
        ("data.manifest=s3://datasets/none/manifest.json", "data.manifest", "not found", "autopainter pack"),
        ("data.manifest=s3://nowhere/manifest.json", "data.manifest", "no bucket 'nowhere'", "create the bucket"),
        ("run.storage=s3://nowhere", "run.storage: answers", "no bucket 'nowhere'", "create the bucket, or correct"),
        (f"loss.vgg_sha256={'0' * 64}", "loss.vgg_weights", "wrong checksum", "autopainter vgg --layer relu2_2"),
        ("loss.vgg_weights=s3://datasets/none", "loss.vgg_weights", "not found", "or correct loss.vgg_sha256"),
    ],
)
def test_what_a_run_needs_is_missing(
    report: Report, small_settings: list[str], change: str, check: str, detail: str, advice: str
) -> None:
    code, rows = report(*sets([*small_settings, change]))
    assert (code, rows[check]["result"]) == (1, "failed")
    assert detail in rows[check]["detail"]
    assert advice in rows[check]["advice"]
    assert [name for name, row in rows.items() if row["result"] == "failed"] == [check]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_gpus_are_wanted_and_none_is_there(report: Report, small_settings: list[str]) -> None:
    code, rows = report(*sets([*small_settings, "cluster.gpus=true"]))
    assert (code, rows["GPUs"]["result"]) == (1, "failed")
    assert "cluster.gpus is true" in rows["GPUs"]["detail"]
    assert "run doctor where the workers run" in rows["GPUs"]["advice"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
@pytest.mark.parametrize(("wanted", "result"), [(True, "failed"), (False, "warning")])
def test_gpus_that_this_torch_cannot_use(
    report: Report,
    small_settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: bool,
    result: str,
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(gpus, "_DEVICES", tmp_path)
    code, rows = report(*sets([*small_settings, f"cluster.gpus={wanted}"]))
    assert (code, rows["GPUs"]["result"]) == (int(wanted), result)
    assert "built for the processor only" in rows["GPUs"]["detail"]
    assert "install a CUDA build of torch" in rows["GPUs"]["advice"]


@pytest.mark.parametrize(
    ("capability", "precision", "result"),
    [((7, 5), "bfloat16", "failed"), ((7, 5), "float32", "ok"), ((8, 0), "bfloat16", "ok")],
)
def test_a_gpu_that_cannot_compute_in_the_precision_of_the_run(
    report: Report,
    small_settings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    precision: str,
    result: str,
) -> None:
    about = SimpleNamespace(name="Tesla T4", total_memory=16 << 30, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 << 30, 16 << 30))
    monkeypatch.setattr(gpus, "product_is_right", lambda device: True)
    code, rows = report(*sets([*small_settings, f"train.precision={precision}"]))
    assert (code, rows["GPU 0"]["result"]) == (int(result == "failed"), result)
    assert "Tesla T4" in rows["GPU 0"]["detail"]
    if result == "failed":
        assert "set train.precision to float32" in rows["GPU 0"]["advice"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build", "570.86.10"),
        (None, "unknown"),
    ],
)
def test_the_version_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, version: str
) -> None:
    if text:
        (tmp_path / "version").write_text(text)
    monkeypatch.setattr(gpus, "_DRIVER", tmp_path / "version")
    assert gpus.driver() == version


@pytest.fixture
def copied(dataset: str, tmp_path: Path) -> Path:
    """The data set in a folder."""
    folder = tmp_path / "data"
    there, here = open_store(dataset.rpartition("/")[0]), open_store(str(folder))
    for entry in there.list():
        here.write(entry.key, there.read(entry.key))
    return folder


def damage_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])


def remove_shard(folder: Path) -> None:
    sorted(folder.rglob("*.tar"))[-1].unlink()


def damage_shard(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_bytes())
    shard = document["splits"]["train"][0]
    data = bytearray((folder / shard["key"]).read_bytes())
    data[shard["sample_files"][0] + 5] ^= 1
    (folder / shard["key"]).write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "check", "detail", "advice"),
    [
        (damage_manifest, "data.manifest", "not JSON", "pack the data set again"),
        (remove_shard, "data.manifest: shards", "is missing", "copy the missing shards there, or pack again"),
        (damage_shard, "data.manifest: train", "the shard is damaged or was replaced", "pack the data set again"),
    ],
)
def test_a_data_set_is_damaged(
    report: Report, small_settings: list[str], copied: Path, spoil: Callable[[Path], None], check: str, detail: str,
    advice: str,
) -> None:  # fmt: skip
    settings = sets([*small_settings, f"data.manifest={copied}/manifest.json"])
    assert report(*settings)[0] == 0
    spoil(copied)
    code, rows = report(*settings)
    assert (code, rows[check]["result"]) == (1, "failed")
    assert detail in rows[check]["detail"]
    assert advice in rows[check]["advice"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "train.stepz=3"], "did you mean train.steps?"),
        (["--config", "/nowhere.yaml"], "cannot be read"),
        (["--storage", "gs://bucket"], "unknown kind of storage"),
        (["--storage", "s3://key:hidden-secret@bucket"], "must hold no credentials"),
        (["--ray", "ray://head:10001"], "write http://HOST:8265"),
        (["--ray", "head"], "write http://HOST:8265"),
        (["--ray", "http://user:hidden-secret@head:8265"], "must hold no credentials"),
        (["--timeout", "0"], "0.1"),
        (["--unknown"], "No such option"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(call: Callable[..., Done], options: list[str], said: str) -> None:
    done = call("doctor", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "hidden-secret" not in done.stderr


# Storage


def assert_unreached(rows: Rows, uri: str, detail: str, advice: str) -> None:
    """The storage failed once, with a reason; the rest was not tried."""
    assert rows[f"{uri}: answers"]["result"] == "failed"
    assert detail in rows[f"{uri}: answers"]["detail"]
    assert advice in rows[f"{uri}: answers"]["advice"]
    assert rows[f"{uri}: the rest"]["result"] == "skipped"
    assert f"{uri}: write" not in rows


def test_wrong_secret(report: Report, aws: Callable[..., None], s3_uri: str) -> None:
    aws(AWS_SECRET_ACCESS_KEY="hidden-secret")
    code, rows = report("--storage", s3_uri)
    assert code == 1
    assert_unreached(rows, s3_uri, "SignatureDoesNotMatch", "the secret does not belong to the key")
    assert rows[f"{s3_uri}: clock"]["result"] == "ok"
    assert "hidden-secret" not in json.dumps(rows)


def test_unknown_key(report: Report, aws: Callable[..., None], s3_uri: str) -> None:
    aws(AWS_ACCESS_KEY_ID="unknown")
    code, rows = report("--storage", s3_uri)
    assert code == 1
    assert_unreached(rows, s3_uri, "InvalidAccessKeyId", "Secret autopainter-s3")


def test_no_credentials(report: Report, aws: Callable[..., None], s3_uri: str, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "none")
    aws(
        AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_SHARED_CREDENTIALS_FILE=nowhere, AWS_CONFIG_FILE=nowhere
    )
    code, rows = report("--storage", s3_uri)
    assert code == 1
    assert_unreached(rows, s3_uri, "no credentials", "or give the pod's service account a role")


def test_no_server(report: Report, aws: Callable[..., None], s3_uri: str, small_settings: list[str]) -> None:
    endpoint = f"http://{HOST}:{free_ports(1)[0]}"
    aws(AWS_ENDPOINT_URL=endpoint)
    code, rows = report("--storage", s3_uri, *sets(small_settings), "--timeout", SECONDS)
    assert code == 1
    assert_unreached(rows, s3_uri, "Could not connect", endpoint)
    assert_unreached(rows, "run.storage", "Could not connect", "Look at its pods, network policies and proxies")
    assert "Could not connect" in rows["data.manifest"]["detail"]


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never says anything."""
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        listening.listen(64)
        yield listening.getsockname()[1]


def test_a_server_that_never_answers(report: Report, aws: Callable[..., None], s3_uri: str, silent: int) -> None:
    aws(AWS_ENDPOINT_URL=f"http://{HOST}:{silent}")
    code, rows = report("--storage", s3_uri, "--timeout", SECONDS)
    assert code == 1
    assert_unreached(rows, s3_uri, f"no answer within {SECONDS} s", f"is this its address: http://{HOST}:{silent}?")
    assert rows[f"{s3_uri}: clock"]["result"] == "skipped"


class Between(http.server.ThreadingHTTPServer):
    """An HTTP server that passes requests on to the S3 server, unless it answers itself.

    Attributes:
        ahead_seconds: what it adds to the Date of answers.
        answers: method and a header that its request must have (or ``""``), to a status and S3's code.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__((HOST, 0), _Passing)
        self.upstream = upstream.removeprefix("http://")
        self.ahead_seconds = 0.0
        self.answers: dict[tuple[str, str], tuple[int, str]] = {}
        self.url = f"http://{HOST}:{self.server_port}"


class _Passing(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Between

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        return email.utils.formatdate((timestamp or time.time()) + self.server.ahead_seconds, usegmt=True)

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        for (method, header), (status, code) in self.server.answers.items():
            if method == self.command and (not header or header in self.headers):
                return self.answer(status, {}, f"<Error><Code>{code}</Code></Error>".encode() if code else b"")
        connection = http.client.HTTPConnection(self.server.upstream, timeout=10)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, body, headers)
        with contextlib.closing(connection), connection.getresponse() as answer:
            kept = {k: v for k, v in answer.getheaders() if k.lower() in ("etag", "content-range", "content-type")}
            data = answer.read()
            if self.command == "HEAD":
                kept["Content-Length"] = answer.getheader("content-length") or "0"
            return self.answer(answer.status, kept, data)

    def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in ({} if self.command == "HEAD" else {"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        if self.command == "HEAD":
            self.send_header("Content-Length", headers.get("Content-Length", "0"))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on


@pytest.fixture
def between(s3: SeaweedFS, aws: Callable[..., None]) -> Iterator[Between]:
    """A ``Between`` that the client of this test talks to."""
    with Between(s3.endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        aws(AWS_ENDPOINT_URL=server.url)
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("ahead", "result", "detail"),
    [(0, "ok", "the storage"), (100, "warning", "s behind the storage"), (-100, "warning", "s ahead of the"),
     (1200, "failed", "s behind the storage"), (-1200, "failed", "s ahead of the storage")],
)  # fmt: skip
def test_a_clock_that_is_wrong(
    report: Report, between: Between, s3_uri: str, ahead: int, result: str, detail: str
) -> None:
    between.ahead_seconds = ahead
    code, rows = report("--storage", s3_uri)
    row = rows[f"{s3_uri}: clock"]
    assert (code, row["result"]) == (int(result == "failed"), result)
    assert detail in row["detail"]
    assert ("set this machine's clock (NTP" in row["advice"]) == (result != "ok")
    assert rows[f"{s3_uri}: delete"]["result"] == "ok"
    assert open_store(s3_uri).list() == []


def test_a_signature_of_another_time_is_refused(report: Report, between: Between, s3_uri: str) -> None:
    between.ahead_seconds = 1200
    between.answers["GET", ""] = (403, "RequestTimeTooSkewed")
    code, rows = report("--storage", s3_uri)
    assert (code, rows[f"{s3_uri}: clock"]["result"]) == (1, "failed")
    assert_unreached(rows, s3_uri, "RequestTimeTooSkewed", "set this machine's clock")


@pytest.mark.parametrize(
    ("method", "header", "answer", "check", "detail", "advice"),
    [
        ("PUT", "", (403, "AccessDenied"), "write", "AccessDenied", "s3:PutObject"),
        ("GET", "range", (403, "AccessDenied"), "ranges", "AccessDenied", "s3:GetObject"),
        ("GET", "", (403, "AccessDenied"), "list", "AccessDenied", "s3:ListBucket"),
        ("POST", "", (403, "AccessDenied"), "delete", "AccessDenied", "s3:DeleteObject"),
        ("PUT", "if-none-match", (200, ""), "conditional put", "replaced an object", "spoil each other's checkpoints"),
        ("PUT", "if-none-match", (501, "NotImplemented"), "conditional put", "NotImplemented", "If-None-Match"),
    ],
)
def test_a_storage_that_does_not_do_what_a_run_needs(
    report: Report, between: Between, s3_uri: str, method: str, header: str, answer: tuple[int, str], check: str,
    detail: str, advice: str,
) -> None:  # fmt: skip
    between.answers[method, header] = answer
    code, rows = report("--storage", s3_uri)
    row = rows[f"{s3_uri}: {check}"]
    assert (code, row["result"]) == (1, "failed")
    assert detail in row["detail"]
    assert advice in row["advice"]
    assert rows[f"{s3_uri}: answers"]["result"] == "ok"
    between.answers.clear()
    if method != "POST":
        assert rows[f"{s3_uri}: delete"]["result"] == "ok"
        assert open_store(s3_uri).list() == []


def test_a_folder_that_is_made_on_demand_is_not_left_behind(report: Report, tmp_path: Path) -> None:
    place = tmp_path / "new" / "runs"
    code, rows = report("--storage", place)
    assert code == 0
    assert {rows[f"{place}: {name}"]["result"] for name in STEPS} == {"ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(report: Report, small_disk: Path) -> None:
    code, rows = report("--storage", small_disk)
    assert code == 1
    assert rows[f"{small_disk}: write"]["result"] == "ok"
    assert rows[f"{small_disk}: large object"]["result"] == "failed"
    (small_disk / "full").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    code, rows = report("--storage", small_disk)
    assert (code, rows[f"{small_disk}: write"]["result"]) == (1, "failed")
    assert "No space left on device" in rows[f"{small_disk}: write"]["detail"]
    assert "free space there" in rows[f"{small_disk}: write"]["advice"]
    assert [path.name for path in small_disk.iterdir()] == ["full"]


def test_a_folder_that_is_read_only(report: Report, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, rows = report("--storage", small_disk)
    assert (code, rows[f"{small_disk}: write"]["result"]) == (1, "failed")
    assert "Read-only file system" in rows[f"{small_disk}: write"]["detail"]
    assert "not mounted read-only" in rows[f"{small_disk}: write"]["advice"]


# Ray

TOKEN = secrets.token_hex(16)


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """URL of the dashboard of a head that wants ``TOKEN``."""
    with RayCluster(num_cpus=2, token=TOKEN) as cluster:
        assert cluster.dashboard_url
        yield cluster.dashboard_url


def test_ray_takes_the_right_token(
    report: Report, guarded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_settings: list[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_ADDRESS", guarded)
    code, rows = report(*sets([*small_settings, "cluster.gpus=false"]))
    assert code == 0
    assert {rows[name]["result"] for name in ("Ray", "Ray token", "Ray version", "Ray resources")} == {"ok"}
    assert "requests without it are refused" in rows["Ray token"]["detail"]
    assert rows["Ray resources"]["detail"] == "1 nodes, 2 cores, 0 GPUs; room for 2 workers"
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    code, rows = report(*sets([*small_settings, "cluster.gpus=true"]))
    assert (code, rows["Ray token"]["result"], rows["Ray resources"]["result"]) == (0, "ok", "warning")
    assert str(path) in rows["Ray token"]["detail"]
    assert "add nodes, or set cluster.workers" in rows["Ray resources"]["advice"]
    assert TOKEN not in json.dumps(rows)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "not-the-token"}, "refuses the token of RAY_AUTH_TOKEN"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "two-lines"},
            "two-lines is empty or holds more than a token",
        ),
        ({"RAY_AUTH_TOKEN": TOKEN}, "wants a token; none was sent because RAY_AUTH_MODE is not 'token'"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/none"},
            "wants a token; there is none to send: RAY_AUTH_TOKEN",
        ),
    ],
)
def test_ray_refuses_a_token(
    report: Report,
    guarded: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: Mapping[str, str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two-lines").write_text(f"{TOKEN}\n{TOKEN}\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, rows = report("--ray", guarded)
    assert (code, rows["Ray"]["result"], rows["Ray token"]["result"]) == (1, "ok", "failed")
    assert said in rows["Ray token"]["detail"]
    assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in rows["Ray token"]["advice"]
    assert not any(secret in json.dumps(rows) for secret in (TOKEN, "not-the-token"))


def test_ray_without_a_token_and_by_its_port(report: Report) -> None:
    with RayCluster(num_cpus=1) as cluster:
        code, rows = report("--ray", cluster.dashboard_url)
        assert (code, rows["Ray token"]["detail"]) == (0, "the cluster asks for none")
        assert rows["Ray version"]["result"] == "ok"
        code, rows = report("--ray", cluster.address)
        assert (code, rows["Ray"]["result"], rows["Ray token"]["result"]) == (0, "ok", "skipped")


def test_ray_is_not_there(report: Report, silent: int, s3: SeaweedFS) -> None:
    closed = free_ports(1)[0]
    for address in (f"http://{HOST}:{closed}", f"{HOST}:{closed}"):
        code, rows = report("--ray", address)
        assert (code, rows["Ray"]["result"]) == (1, "failed")
        assert "Connection refused" in rows["Ray"]["detail"]
        assert "is the head up" in rows["Ray"]["advice"]
    code, rows = report("--ray", f"http://{HOST}:{silent}", "--timeout", SECONDS)
    assert (code, rows["Ray"]["result"]) == (1, "failed")
    assert "is the head up" in rows["Ray"]["advice"]
    code, rows = report("--ray", "auto")
    assert (code, rows["Ray"]["result"]) == (0, "skipped")


class _OtherRay(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(b'{"ray_version": "2.0.0"}' if self.path == "/api/version" else b"?")


@pytest.mark.parametrize(
    ("status", "check", "detail", "advice"),
    [(200, "Ray version", "the cluster has 2.0.0", "use one version everywhere"),
     (404, "Ray", "HTTP 404, which is no answer of Ray's dashboard", "correct the address"),
     (302, "Ray", "HTTP 302, which is no answer of Ray's dashboard", "correct the address")],
)  # fmt: skip
def test_another_ray_or_none(report: Report, status: int, check: str, detail: str, advice: str) -> None:
    with http.server.ThreadingHTTPServer((HOST, 0), _OtherRay) as server:
        server.status = status  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        code, rows = report("--ray", f"http://{HOST}:{server.server_port}")
        server.shutdown()
        thread.join()
    assert (code, rows[check]["result"]) == (1, "failed")
    assert detail in rows[check]["detail"]
    assert advice in rows[check]["advice"]
