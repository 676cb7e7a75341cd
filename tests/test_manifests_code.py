"""The manifests and the code say the same: configuration, commands, variables, versions, references, apply order."""

import importlib.metadata
import importlib.util
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import manifests
import pytest
import yaml
from manifests import K8S, ROOT, Document, Pod
from waiting import PATIENCE_SECONDS

from autopainter import cli
from autopainter import config as configuration
from autopainter.config import Config
from autopainter.errors import UserError

pods = manifests.all_pods()
flat = [manifest for path in sorted(K8S.glob("*.yaml")) for manifest in manifests.load(path)]
job: Document = manifests.one("RayJob", "autopainter")["spec"]
pack: Document = manifests.one("RayJob", "autopainter-pack")["spec"]
environment: dict[str, str] = manifests.one("ConfigMap", "autopainter-env")["data"]
(workers,) = job["rayClusterSpec"]["workerGroupSpecs"]
worker: Document = workers["template"]["spec"]["containers"][0]
sidecar: Document = workers["template"]["spec"]["initContainers"][0]


@pytest.fixture
def train_yaml(tmp_path: Path) -> Path:
    """The file that the training job mounts."""
    path = tmp_path / "train.yaml"
    path.write_text(manifests.one("ConfigMap", "autopainter-config")["data"]["train.yaml"])
    return path


@pytest.fixture
def config(train_yaml: Path) -> Config:
    """The configuration of the training job, with the environment of its pods."""
    return configuration.load(train_yaml, environment=environment)


def variables(pod: Pod) -> Iterator[tuple[str, str]]:
    """Names and values that are set for a pod's containers, but for Secrets."""
    for container in pod.containers:
        for entry in container.get("env", []):
            yield entry["name"], entry["value"]
        if {"configMapRef": {"name": "autopainter-env"}} in container.get("envFrom", []):
            yield from environment.items()


def test_files_are_applied_in_order_and_all_of_them() -> None:
    assert flat[0].document["kind"] == "Namespace"
    assert not list(K8S.rglob("kustomization.y*ml"))  # kubectl apply -f would fail on it
    assert not [path for path in K8S.rglob("*.y*ml") if path.suffix != ".yaml"]
    kinds = [manifest.document["kind"] for manifest in flat]
    assert kinds.count("RayJob") == 1
    assert kinds[-1] == "RayJob"  # whose CRD may be missing; all that it needs is there before it
    assert {m.document["apiVersion"].split("/")[0] for m in flat if m.document["kind"] != "RayJob"} <= {
        "v1", "apps", "networking.k8s.io", "policy", "scheduling.k8s.io",
    }  # fmt: skip


def test_everything_is_in_the_namespace_that_only_takes_restricted_pods() -> None:
    cluster_wide = {"Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue"}
    for manifest in manifests.everything():
        there = manifest.document["metadata"].get("namespace")
        assert (there is None) if manifest.document["kind"] in cluster_wide else (there == "autopainter"), manifest.name
    labels = manifests.one("Namespace", "autopainter")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_secrets_are_examples_without_a_secret() -> None:
    secrets = [manifest for manifest in manifests.everything() if manifest.document["kind"] == "Secret"]
    assert {manifest.path.parent.name for manifest in secrets} == {"examples"}
    for manifest in secrets:
        assert set(manifest.document["stringData"].values()) == {"REPLACE"}
        assert "data" not in manifest.document
    assert "auth_token" in manifests.one("Secret", "autopainter-ray-token")["stringData"]  # the operator's name for it


def _references(part: Any) -> Iterator[tuple[str, str]]:
    """Kind and name of what a part of a pod refers to."""
    if isinstance(part, list):
        for value in part:
            yield from _references(value)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key in ("configMapRef", "secretRef", "configMap"):
                yield ("Secret" if key == "secretRef" else "ConfigMap"), value["name"]
            elif key == "serviceAccountName":
                yield "ServiceAccount", value
            elif key == "priorityClassName":
                yield "PriorityClass", value
            else:
                yield from _references(value)


def test_everything_that_pods_refer_to_exists() -> None:
    there = {(m.document["kind"], m.document["metadata"]["name"]) for m in manifests.everything()}
    for pod in pods:
        wanted = set(_references(pod.spec))
        assert ("ServiceAccount", "autopainter") in wanted, pod.name
        assert wanted <= there, pod.name


def test_numbers_of_the_run_and_of_its_pods_agree(config: Config) -> None:
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert config.cluster.workers == workers["replicas"] * gpus
    assert workers["minReplicas"] == workers["maxReplicas"] == workers["replicas"]
    assert config.cluster.cpus_per_worker * gpus <= float(worker["resources"]["requests"]["cpu"])
    config.check_world(config.cluster.workers, "cluster.workers")
    assert config.data.image_size == 512
    runtime = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]
    assert yaml.safe_load((ROOT / "job/runtime-env.yaml").read_text())["env_vars"].items() <= runtime.items()
    assert float(runtime["RAY_JOB_STOP_WAIT_TIME_S"]) > config.cluster.stop_seconds
    assert environment["AWS_DEFAULT_REGION"] == environment["AWS_REGION"]
    # While one worker tries to read again, the others wait for it in a collective.
    assert float(environment["AUTOPAINTER_STORAGE_RETRY_SECONDS"]) < config.cluster.collective_timeout_seconds


def test_a_field_that_does_not_exist_is_found(train_yaml: Path) -> None:
    with pytest.raises(UserError, match="unknown field"):
        configuration.load(train_yaml, environment={**environment, "AUTOPAINTER__TRAIN__STEP": "5"})


def test_metrics_of_the_workers_are_served_by_their_sidecar(config: Config) -> None:
    name, *arguments = sidecar["command"][1:]
    parsed = cli.cli.commands[name].make_context(name, list(arguments)).params
    assert str(parsed["folder"]) == config.telemetry.metrics_folder
    assert config.telemetry.prometheus_port == 0  # else each pod would serve them twice
    mounted = [{m["mountPath"]: m["name"] for m in c["volumeMounts"]} for c in (worker, sidecar)]
    assert len({mounts[str(parsed["folder"])] for mounts in mounted}) == 1
    assert sidecar["ports"] == [{"containerPort": parsed["port"], "name": "autopainter"}]
    assert sidecar["restartPolicy"] == "Always"  # a native sidecar, not an init container that must end
    assert "readinessProbe" not in sidecar  # a worker trains on without its metrics


def test_what_prometheus_scrapes_is_declared() -> None:
    monitors = [m.document for m in manifests.everything() if m.document["kind"] == "PodMonitor"]
    assert monitors
    for monitor in monitors:
        wanted = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        labels = monitor["spec"]["selector"]["matchLabels"].items()
        found = [pod for pod in pods if labels <= pod.document["metadata"]["labels"].items() and "50-train" in pod.name]
        declared = {port["name"] for pod in found for container in pod.containers for port in container["ports"]}
        assert wanted <= declared


@pytest.mark.parametrize(
    "entrypoint", [job["entrypoint"], manifests.one("RayJob", "autopainter-pack")["spec"]["entrypoint"]]
)
def test_an_entrypoint_starts(entrypoint: str, train_yaml: Path) -> None:
    program, script, *options = shlex.split(entrypoint)
    assert program == "python"
    # What a dry run and --help leave out needs a cluster; tests/test_job.py and tests/test_job_pack.py have that.
    end = ["--dry-run"] if script == "job/train.py" else ["--help"]
    command = [
        sys.executable,
        script,
        *[option.replace("/etc/autopainter/train.yaml", str(train_yaml)) for option in options],
    ]
    done = subprocess.run([*command, *end], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert ("s3://autopainter/runs/cartoons on 2 Ray worker(s)" if end == ["--dry-run"] else "PICTURES") in done.stdout


def test_data_goes_from_one_job_to_the_next(config: Config) -> None:
    destination = shlex.split(pack["entrypoint"])[-1]
    assert config.data.manifest == f"{destination}/manifest.json"
    weights = manifests.one("Job", "autopainter-weights")["spec"]["template"]["spec"]["containers"][0]["command"]
    name, *arguments = weights[1:]
    assert cli.cli.commands[name].make_context(name, list(arguments)).params["output"] == config.loss.vgg_weights
    board = manifests.one("Deployment", "autopainter-tensorboard")["spec"]["template"]["spec"]["containers"][0]
    assert board["command"][board["command"].index("--logdir") + 1] == config.run.storage


def test_variables_are_known_to_what_reads_them() -> None:
    package = importlib.util.find_spec("ray")
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0])
    ray = (folder / "_raylet.so").read_bytes() + (folder / "core/src/ray/raylet/raylet").read_bytes()
    ray += b"".join(path.read_bytes() for place in ("_private", "_common", "dashboard", "train/v2/_internal", "scripts")
                    for path in (folder / place).rglob("*.py"))  # fmt: skip
    ours = "".join(path.read_text() for place in ("autopainter", "job") for path in (ROOT / place).rglob("*.py"))
    settings = {name for pod in pods for name, _ in variables(pod)}
    settings |= yaml.safe_load(job["runtimeEnvYAML"])["env_vars"].keys()
    assert len(settings) >= 7
    for name in settings:
        if name.startswith("RAY_"):
            assert (name.encode() in ray) or (name.removeprefix("RAY_").encode() in ray), name
        elif name.startswith("AUTOPAINTER_"):
            assert name in ours, name
        else:
            assert name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "GOMEMLIMIT"), name


def test_versions_agree() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"]
    for name in ("RayJob", "RayCluster"):
        for manifest in manifests.everything():
            if manifest.document["kind"] == name:
                spec = manifest.document["spec"]
                version = spec.get("rayClusterSpec", spec)["rayVersion"]
                assert extra == [f"ray[default,train]=={version}"]
                assert importlib.metadata.version("ray") == version


def test_the_queue_has_room_for_the_run() -> None:
    (group,) = manifests.one("ClusterQueue", "autopainter")["spec"]["resourceGroups"]
    quota = {entry["name"]: entry["nominalQuota"] for flavor in group["flavors"] for entry in flavor["resources"]}
    ours = [pod for pod in pods if "k8s/50-train.yaml" in pod.name]
    copies = [pod for pod in ours for _ in range(workers["replicas"] if "gpu" in pod.name else 1)]
    resources = [container["resources"] for pod in copies for container in pod.containers]
    wanted = {
        "cpu": sum(manifests.cores(each["requests"]["cpu"]) for each in resources),
        "memory": sum(manifests.bytes_of(each["requests"]["memory"]) for each in resources),
        "nvidia.com/gpu": sum(int(each["limits"].get("nvidia.com/gpu", 0)) for each in resources),
    }
    assert wanted["cpu"] <= manifests.cores(quota["cpu"])
    assert wanted["memory"] <= manifests.bytes_of(quota["memory"])
    assert wanted["nvidia.com/gpu"] == int(quota["nvidia.com/gpu"])
    assert manifests.one("LocalQueue", "autopainter")["spec"]["clusterQueue"] == "autopainter"
