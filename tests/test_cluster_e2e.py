"""What scripts/cluster_e2e.py makes of the manifests, and what it reads in logs; the rest of it needs Docker."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from e2e_manifests import MEMORY, Manifests, Template
from e2e_operator import RayCluster, Submission
from e2e_pods import Pod, rights
from e2e_views import Prometheus, RunLog

from autopainter import config

TOKEN = "a-token"
SECRETS = {"autopainter-s3": {"AWS_ACCESS_KEY_ID": "key"}, "autopainter-ray-token": {"auth_token": TOKEN}}


class Recorder:
    """In a kubelet's place: notes what would be started."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.pods = logs, []

    def start(self, template: Template) -> Pod:
        self.pods.append(Pod(template.name, template, f"10.0.0.{len(self.pods) + 1}", self.logs))
        return self.pods[-1]


class Client:
    """In a Docker client's place: does nothing."""

    def start(self, *_: str, output: Path) -> "subprocess.Popen[bytes]":
        output.touch()
        return subprocess.Popen(["true"])


@pytest.fixture
def manifests() -> Manifests:
    return Manifests(SECRETS, steps=123)


@pytest.fixture
def pods(manifests: Manifests, tmp_path: Path) -> dict[str, Pod]:
    """All pods of the cluster by component."""
    kubelet, job = Recorder(tmp_path), manifests.get("RayJob", "autopainter")
    cluster = RayCluster(kubelet, manifests, job)  # type: ignore[arg-type]
    cluster.start_head()
    cluster.answers = lambda: True  # type: ignore[method-assign]
    cluster.tend()
    Submission(kubelet, Client(), cluster, job)._follow.wait()  # type: ignore[arg-type]
    kubelet.start(manifests.workload("StatefulSet", "autopainter-storage"))
    kubelet.start(manifests.workload("Deployment", "autopainter-tensorboard"))
    return {pod.template.component: pod for pod in kubelet.pods}


def test_every_container_is_under_the_restricted_profile(pods: dict[str, Pod]) -> None:
    assert pods.keys() == MEMORY.keys()
    for pod in pods.values():
        spec = pod.template.spec
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            given = " ".join(rights(spec, container))
            for option in ("--user 1000:1000", "--cap-drop ALL", "--read-only", "--security-opt no-new-privileges"):
                assert option in given


def test_ray_starts_as_kuberay_starts_it(pods: dict[str, Pod]) -> None:
    head, worker = (pods[name].template for name in ("head", "worker"))
    shell, start = head.commands["ray-head"][:-1], head.commands["ray-head"][-1]
    assert shell == ["/bin/bash", "-c", "--"]
    assert start.startswith("ulimit -n 65536; ray start --head --block --dashboard-agent-listen-port=52365")
    assert "--num-cpus=0 --num-gpus=0" in start
    start = worker.commands["ray-worker"][-1]
    assert f"--address={head.hosts[0]}:6379" in start
    assert worker.env["ray-worker"]["RAY_ADDRESS"] == f"{head.hosts[0]}:6379"
    for template in (head, worker):
        env = template.env[template.main]
        assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN"]) == ("token", TOKEN)


def test_the_submitter_submits_the_manifests_entrypoint_once(pods: dict[str, Pod], manifests: Manifests) -> None:
    template = pods["submitter"].template
    command = template.commands["ray-job-submitter"][-1]
    submission = template.env["ray-job-submitter"]["RAY_JOB_SUBMISSION_ID"]
    dashboard = template.env["ray-job-submitter"]["RAY_DASHBOARD_ADDRESS"]
    assert command.index("gcs_healthz") < command.index("if ! ray job status") < command.index("ray job submit")
    assert (
        f"--submission-id {submission} -- {manifests.get('RayJob', 'autopainter')['spec']['entrypoint']} ;" in command
    )
    assert command.endswith(f"ray job logs --address {dashboard} --follow {submission}")
    assert TOKEN not in command
    # The shell must take it for one argument.
    wanted = "import sys; print(sys.argv[sys.argv.index('--runtime-env-json') + 1])"
    part = command[command.index(" submit ") : command.index(" ; fi")]
    shown = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{wanted}" {part}'], capture_output=True, text=True)
    assert json.loads(shown.stdout)["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "120"


def test_the_small_configuration_is_valid_and_keeps_what_the_manifest_says(
    manifests: Manifests, tmp_path: Path
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(manifests.config_map("autopainter-config")["train.yaml"])
    loaded = config.load(str(path), [], environment={})
    assert (loaded.run.name, loaded.train.steps) == (manifests.run, 123)
    assert loaded.telemetry.metrics_folder == "/var/run/autopainter"
    assert loaded.cluster.gpus is False


def test_prometheus_is_shown_the_ports_of_the_pod_monitors(
    pods: dict[str, Pod], manifests: Manifests, tmp_path: Path
) -> None:
    prometheus = Prometheus(manifests, tmp_path / "prometheus")
    prometheus.show(pods.values())
    entries = json.loads((tmp_path / "prometheus/targets.json").read_text())
    found = {target for entry in entries for target in entry["targets"]}
    head, worker = pods["head"].ip, pods["worker"].ip
    assert found == {f"{head}:8080", f"{head}:44217", f"{head}:44227", f"{worker}:8080", f"{worker}:9400"}
    checked = subprocess.run(["bash", "-c", "type promtool"], capture_output=True)
    if checked.returncode == 0:
        done = subprocess.run(["promtool", "check", "config", tmp_path / "prometheus/prometheus.yml"])
        assert done.returncode == 0


WORKER = "\x1b[36m(RayTrainWorker pid=9, ip=10.0.0.3)\x1b[0m"
FIRST_START = [
    f"{WORKER} 09:00:01 run mine, attempt 1: steps 0 to 20 on 2 worker(s)",
    "09:00:02 step 5/20  1.0 images/s",
    f"{WORKER} 09:00:02 checkpoint of step 5 saved",
    "09:00:03 step 8/20  1.0 images/s",
]


def test_a_run_is_read_from_the_jobs_log() -> None:
    now = 100.0
    log = RunLog("mine", lambda: now)
    log.feed(["09:00:00 run other, attempt 9: steps 5 to 20 on 2 worker(s)", "step 3/20  1.0 images/s"])
    assert log.attempts == []
    log.feed(FIRST_START)
    (old,) = log.attempts
    assert (old.start, old.saved, old.last) == (0, 5, 8)
    now += 30
    # Another submitter begins at the beginning; what it repeats is not news.
    log.feed([*FIRST_START, "run mine, attempt 2: steps 5 to 20 on 2 worker(s)", "step 6/20 ", "step 8/20 "])
    assert (len(log.attempts), log.attempts[1].start, log.first_beyond(old)) == (2, 5, None)
    now += 1
    log.feed(["step 9/20 "])
    assert log.first_beyond(old) == now


def test_a_step_that_is_shown_before_its_start_belongs_to_that_start() -> None:
    now = 100.0
    log = RunLog("mine", lambda: now)
    log.feed(FIRST_START)
    now += 30
    log.feed(["step 9/20 ", "run mine, attempt 2: steps 8 to 20 on 2 worker(s)", "step 10/20 "])
    old, new = log.attempts
    assert (old.last, new.last, log.first_beyond(old)) == (8, 10, now)


def test_an_unknown_fault_is_refused() -> None:
    command = [sys.executable, "scripts/cluster_e2e.py", "--kinds", "term,flood"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--kinds: flood not of term, memory, worker, head" in done.stderr
