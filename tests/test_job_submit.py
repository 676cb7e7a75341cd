"""Jobs on a Ray cluster that wants a token: submitted, followed, stopped; what has no token is refused.

Run: pytest tests/test_job_submit.py
"""

import contextlib
import ipaddress
import json
import os
import re
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import JobSettings
from driving import JOB, RARELY, STEPS, Driver, saved
from services import RayCluster, SeaweedFS
from waiting import PATIENCE_SECONDS, until

from autopainter import journal, storage

RAY = str(Path(sys.executable).parent / "ray")
TOKEN = secrets.token_hex(16)


@pytest.fixture(scope="module")
def cluster(s3: SeaweedFS) -> Iterator[RayCluster]:
    """A cluster with token authentication; address and token are in ``os.environ``."""
    with pytest.MonkeyPatch.context() as patch, RayCluster(4, env=dict(s3.env), token=TOKEN) as cluster:
        for name, value in cluster.env.items():
            patch.setenv(name, value)
        yield cluster


def submit(job: str, settings: list[str], *options: str) -> Driver:
    """Submit the training job as the README says."""
    command = [RAY, "job", "submit", "--working-dir", ".", "--runtime-env", "job/runtime-env.yaml", *options]
    return Driver(settings, (*command, "--submission-id", job, "--", *JOB))


def ray_job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=os.environ | environment
    )


def ask(cluster: RayCluster, path: str, token: str | None = TOKEN) -> tuple[int, bytes]:
    """Status and body of the dashboard's answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(
            urllib.request.Request(f"{cluster.dashboard_url}{path}", headers=headers), timeout=30
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def about(cluster: RayCluster, job: str) -> dict[str, object]:
    """What the cluster says of a job."""
    status, body = ask(cluster, f"/api/jobs/{job}")
    assert status == 200
    return dict(json.loads(body))


def test_a_submitted_job_trains_and_can_be_followed(cluster: RayCluster, job_settings: JobSettings) -> None:
    settings, run = job_settings(2)
    output = submit("good", settings).finish()
    assert "succeeded" in output
    assert max(saved(run)) == STEPS
    assert about(cluster, "good")["status"] == "SUCCEEDED"
    assert "Job 'good' succeeded" in ray_job("status", "good").stdout
    log = ray_job("logs", "good")
    trained = [int(step) for step in re.findall(rf"step (\d+)/{STEPS} ", log.stdout)]
    assert trained[:20] == list(range(1, 21))  # Ray may lose the last
    assert log.stdout.count("checkpoint of step 2 saved") == 1
    assert "\x1b" not in "".join(line for line in log.stdout.splitlines() if "RayTrainWorker" in line)
    assert TOKEN not in output + log.stdout + log.stderr


def test_a_job_that_the_user_must_mend_fails_with_its_line(cluster: RayCluster, job_settings: JobSettings) -> None:
    settings, run = job_settings(2)
    output = submit("bad", [*settings, "train.global_batch=7"]).finish(1)
    assert "train.global_batch: 7 is not divisible by cluster.workers 2" in output
    job = about(cluster, "bad")
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)
    assert saved(run) == []


def test_a_stopped_job_saves_first(cluster: RayCluster, job_settings: JobSettings) -> None:
    settings, run = job_settings(2)
    driver = submit("stopped", [*settings, *RARELY, "telemetry.image_every_steps=1000", "train.steps=100000"])
    driver.wait_for(r"step 5/")
    assert ray_job("stop", "stopped", "--no-wait").returncode == 0
    until(lambda: journal.counts(storage.open_store(run))["stopped"])
    driver.finish()  # the client's exit code of a stopped job is 0
    assert len(saved(run)) == 1
    assert about(cluster, "stopped")["status"] == "STOPPED"


def test_without_the_token_there_is_no_answer(cluster: RayCluster) -> None:
    assert [ask(cluster, "/api/jobs/", token)[0] for token in (None, "wrong" * 8, TOKEN)] == [401, 403, 200]


@pytest.mark.parametrize("environment", [{"RAY_AUTH_TOKEN": "wrong" * 8}, {"RAY_AUTH_MODE": "disabled"}])
def test_a_client_without_the_token_starts_nothing(cluster: RayCluster, environment: dict[str, str]) -> None:
    before = json.loads(ask(cluster, "/api/jobs/")[1])
    done = ray_job("submit", "--no-wait", "--", "true", **environment)
    assert done.returncode != 0
    assert re.search("token", done.stdout + done.stderr, re.IGNORECASE)
    assert json.loads(ask(cluster, "/api/jobs/")[1]) == before


def test_a_driver_without_the_token_is_told_so(cluster: RayCluster, job_settings: JobSettings) -> None:
    settings, run = job_settings(2)
    output = Driver(settings, RAY_AUTH_TOKEN="wrong" * 8).finish(2)
    (line,) = [line for line in output.splitlines() if line.startswith("job/train.py: ")]
    assert "RAY_ADDRESS: no Ray cluster answers at" in line
    assert "RAY_AUTH_TOKEN" in line
    assert "Traceback" not in output
    assert saved(run) == []


def test_nothing_listens_to_the_network(cluster: RayCluster) -> None:
    addresses = set()
    for process in (psutil.Process(cluster.pid), *psutil.Process(cluster.pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            addresses |= {
                ipaddress.ip_address(connection.laddr.ip.removeprefix("::ffff:"))  # IPv4 as a socket of IPv6 shows it
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            }
    assert addresses
    assert all(address.is_loopback for address in addresses)
