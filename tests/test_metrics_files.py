"""The list of metrics, the files of the workers, and what is served of them.

Reference: prometheus_client's parser, and promtool of Debian's package prometheus.
Run: pytest tests/test_metrics_files.py
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import HOST, free_ports
from scraping import check, collect, exposition, get, parse
from waiting import PATIENCE_SECONDS, until

from autopainter.telemetry import metric_list as metric
from autopainter.telemetry.metric_files import Recorder, decode, temporary_folder
from autopainter.telemetry.metric_list import METRICS
from autopainter.telemetry.metric_server import FolderCollector, MetricsServer

# The list


def test_names_follow_the_conventions() -> None:
    assert len({entry.name for entry in METRICS}) == len(METRICS)
    for entry in METRICS:
        assert entry.name.startswith("autopainter_")
        assert entry.name.endswith("_total") == (entry.kind == "counter")
        assert ("seconds" in entry.unit) <= ("_seconds" in entry.name)
        assert (entry.unit == "bytes") == ("_bytes" in entry.name)
        assert entry.help[0].isupper()
        assert entry.help[-1] != "."


def test_prometheus_finds_nothing_to_say_about_any_metric(tmp_path: Path) -> None:
    for rank in range(2):
        recorder = Recorder("minions", rank, 1.0, tmp_path)
        for entry in METRICS:
            recorder.add(entry, 1.5, *("some label" for _ in entry.labels))
        recorder.write()
    text = exposition(tmp_path)
    assert {key[0] for key in parse(text)} == {entry.name for entry in METRICS}
    check(text)


# The files


def test_values_of_all_workers_are_collected(tmp_path: Path) -> None:
    for rank in range(3):
        recorder = Recorder("minions", rank, 1.0, tmp_path)
        recorder.set(metric.STEP, 40 + rank)
        recorder.add(metric.DATA_WAIT, rank + 0.5)
        recorder.write()
    assert collect(tmp_path) == {
        ("autopainter_step", "minions"): 40,
        **{("autopainter_data_wait_seconds_total", "minions", str(rank)): rank + 0.5 for rank in range(3)},
    }


def test_counters_go_on_after_a_restart_and_gauges_do_not(tmp_path: Path) -> None:
    first = Recorder("minions", 0, 1.0, tmp_path)
    first.add(metric.DATA_WAIT, 7)
    first.add(metric.STOPS, 2, "killed")
    first.set(metric.MEMORY_RUNG, 3)
    first.write()
    second = Recorder("minions", 0, 2.0, tmp_path)
    second.add(metric.DATA_WAIT, 0.5)
    second.reach(metric.STOPS, 1, "killed")
    second.reach(metric.STOPS, 1, "hang")
    second.write()
    assert collect(tmp_path) == {
        ("autopainter_data_wait_seconds_total", "minions", "0"): 7.5,
        ("autopainter_stops_total", "minions", "killed"): 2,
        ("autopainter_stops_total", "minions", "hang"): 1,
    }


def test_a_worker_that_moved_away_leaves_its_counters_only(tmp_path: Path) -> None:
    """Worker 0 was here at the first start and is elsewhere at the second; another run is not touched by that."""
    for run, rank, begun in (("minions", 0, 1.0), ("minions", 1, 2.0), ("other", 0, 1.0)):
        recorder = Recorder(run, rank, begun, tmp_path)
        recorder.set(metric.LAST_STEP, begun)
        recorder.set(metric.LAST_END, begun)
        recorder.add(metric.BYTES_READ, 5)
        recorder.write()
    assert collect(tmp_path) == {
        ("autopainter_data_read_bytes_total", "minions", "0"): 5,
        ("autopainter_data_read_bytes_total", "minions", "1"): 5,
        ("autopainter_last_step_timestamp_seconds", "minions", "1"): 2,
        ("autopainter_data_read_bytes_total", "other", "0"): 5,
        ("autopainter_last_step_timestamp_seconds", "other", "0"): 1,
        ("autopainter_last_end_timestamp_seconds", "other"): 1,
    }


def test_values_that_are_no_numbers_are_shown(tmp_path: Path) -> None:
    recorder = Recorder("minions", 0, 1.0, tmp_path)
    recorder.set(metric.LOSS, float("nan"), "generator/loss")
    recorder.set(metric.LOSS, float("inf"), "generator/tv")
    recorder.write()
    assert str(collect(tmp_path)["autopainter_loss", "minions", "generator/loss"]) == "nan"
    assert collect(tmp_path)["autopainter_loss", "minions", "generator/tv"] == float("inf")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"run": "minions"}', b'{"run":"m","rank":0,"begun":1,"values":[["x"]]}', b"\xff\xfe",
     b'{"run":"m","rank":"first","begun":1,"values":[]}'],
)  # fmt: skip
def test_a_damaged_file_is_passed_over_and_written_anew(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "minions.1.json").write_bytes(content)
    other = Recorder("minions", 0, 1.0, tmp_path)
    other.set(metric.STEP, 5)
    other.write()
    collector = FolderCollector(tmp_path)
    for _ in range(3):
        assert [family.name for family in collector.collect()] == ["autopainter_step"]
    assert caplog.text.count("minions.1.json: passed over") == 1
    recorder = Recorder("minions", 1, 1.0, tmp_path)
    assert "minions.1.json: damaged, counters begin at 0" in caplog.text
    recorder.add(metric.BYTES_READ, 3)
    recorder.write()
    assert collect(tmp_path)["autopainter_data_read_bytes_total", "minions", "1"] == 3


def test_what_another_version_wrote_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    values = [["autopainter_step", [], 4], ["autopainter_from_the_future", ["x"], 1], ["autopainter_loss", [], 2]]
    document = {"run": "minions", "rank": 0, "begun": 1.0, "values": values, "more": True}
    (tmp_path / "minions.0.json").write_text(json.dumps(document))
    assert collect(tmp_path) == {("autopainter_step", "minions"): 4}


WRITER = """
import sys
from pathlib import Path
from autopainter.telemetry.metric_files import Recorder
from autopainter.telemetry.metric_list import BYTES_READ
recorder = Recorder("minions", 0, 1.0, Path(sys.argv[1]))
while True:
    recorder.add(BYTES_READ, 1)
    recorder.write()
"""


def test_a_worker_killed_while_it_writes_leaves_a_good_file(tmp_path: Path) -> None:
    file = tmp_path / "minions.0.json"
    count = 0.0
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) as writer:
            for _ in range(20):
                before = count
                until(
                    lambda before=before: (
                        file.exists() and next(iter(decode(file.read_bytes()).values.values())) > before
                    )
                )
                count = next(iter(decode(file.read_bytes()).values.values()))
            writer.kill()
        left = next(iter(decode(file.read_bytes()).values.values()))
        assert left >= count
        count = left
    assert len(list(tmp_path.iterdir())) <= 2


def test_a_full_disk_is_a_warning_and_the_last_values_stay(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder("minions", 0, 1.0, small_disk)
    recorder.set(metric.STEP, 1)
    recorder.write()
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 14))
    for step in range(2, 5):
        recorder.set(metric.STEP, step)
        recorder.write()
    assert collect(small_disk) == {("autopainter_step", "minions"): 1}
    assert caplog.text.count("metrics cannot be written") == 1
    filler.unlink()
    recorder.write()
    assert collect(small_disk) == {("autopainter_step", "minions"): 4}


def test_a_temporary_folder_is_one_runs_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = temporary_folder("s3://runs/one")
    (one / "one.0.json").write_text("{}")
    assert one.stat().st_mode & 0o077 == 0
    assert temporary_folder("s3://runs/one") == one
    other = temporary_folder("s3://runs/other")
    assert other != one
    os.utime(one, (0, 0))
    temporary_folder("s3://runs/other")
    assert sorted(tmp_path.iterdir()) == [other]
    other.rmdir()
    other.symlink_to(tmp_path)
    with pytest.raises(OSError, match=r"exists|somebody else"):
        temporary_folder("s3://runs/other")


# The endpoint


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MetricsServer]:
    made = MetricsServer(tmp_path, 0, HOST)
    yield made
    made.close()


def test_nothing_but_metrics_is_served(server: MetricsServer) -> None:
    for path in ("/", "/metrics/", "/favicon.ico", "/../etc/passwd", "/metrics2"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(server.port, path)
    assert get(server.port) == get(server.port, "/metrics?x=1") == ""
    connection = http.client.HTTPConnection(HOST, server.port)
    connection.request("POST", "/metrics", b"x")
    assert connection.getresponse().status == 501
    connection.close()


def test_a_client_that_says_nothing_keeps_nobody_waiting(server: MetricsServer, tmp_path: Path) -> None:
    with socket.create_connection((HOST, server.port)) as silent:
        recorder = Recorder("minions", 0, 1.0, tmp_path)
        recorder.set(metric.STEP, 5)
        recorder.write()
        assert parse(get(server.port)) == {("autopainter_step", "minions"): 5}
        silent.sendall(b"GET ")


def test_the_endpoint_listens_on_ipv6(tmp_path: Path) -> None:
    try:
        made = MetricsServer(tmp_path, 0, "::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with socket.create_connection(("::1", made.port)) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert connection.recv(20).startswith(b"HTTP/1.0 200")
    made.close()


# The command


@pytest.fixture
def command(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", Path, int]]:
    """``autopainter metrics`` of an empty folder, and its port."""
    (port,) = free_ports(1)
    program = [str(Path(sys.executable).parent / "autopainter"), "metrics", "--folder", str(tmp_path)]
    with subprocess.Popen(
        [*program, "--port", str(port), "--host", HOST], stderr=subprocess.PIPE, text=True
    ) as running:  # fmt: skip
        assert running.stderr
        assert f"metrics of {tmp_path} at http://{HOST}:{port}/metrics" in running.stderr.readline()
        yield running, tmp_path, port
        running.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_what_comes_into_the_folder_until_it_is_ended(
    command: tuple["subprocess.Popen[str]", Path, int], number: signal.Signals
) -> None:
    running, folder, port = command
    assert get(port) == ""
    for step in (5, 6):
        recorder = Recorder("minions", 0, float(step), folder)
        recorder.set(metric.STEP, step)
        recorder.write()
        assert parse(get(port)) == {("autopainter_step", "minions"): step}
    running.send_signal(number)
    assert running.wait(timeout=PATIENCE_SECONDS) == 0
    assert running.stderr
    assert running.stderr.read() == ""


def test_bad_input_of_the_command_is_one_line(call: Callable[..., object], tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "file").write_text("")
        for arguments, said in (
            (("--folder", tmp_path / "nowhere"), "no such folder"),
            (("--folder", tmp_path / "file"), "no such folder"),
            (("--folder", tmp_path, "--port", 0), "--port"),
            (("--folder", tmp_path, "--port", 65536), "--port"),
            (("--folder", tmp_path, "--port", port, "--host", HOST), str(port)),
            (("--folder", tmp_path, "--host", "no.such.host.invalid"), "no.such.host.invalid"),
            ((), "--folder"),
        ):
            done = call("metrics", *arguments)
            assert (done.returncode, done.stdout) == (2, "")  # type: ignore[attr-defined]
            lines = done.stderr.strip().splitlines()  # type: ignore[attr-defined]
            assert len(lines) == 1
            assert said in lines[0]


def test_the_command_does_not_load_torch() -> None:
    """It runs beside each worker, in a container with little memory."""
    modules = "autopainter.cli.metrics, autopainter.host, autopainter.telemetry.metric_server"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
