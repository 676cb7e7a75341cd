"""Every pod that the manifests make: security, memory, the shut-down of workers, and how pods fit each other.

The pods inside RayJob and RayCluster are expanded first; no validator looks into those.
"""

import copy
from collections.abc import Callable
from typing import Any

import manifests
import pytest
from manifests import IMAGE, Document, Pod

pods = manifests.all_pods()
ray_nodes = [pod for pod in pods if pod.containers[-1]["name"] in ("ray-head", "ray-worker")]


def each(parts: list[Pod]) -> pytest.MarkDecorator:
    """A test for each pod, by its name."""
    return pytest.mark.parametrize("pod", parts, ids=[pod.name for pod in parts])


def head_and_workers() -> tuple[Pod, Pod]:
    """Of the training job, copied, to be broken."""
    head, worker = (pod for pod in ray_nodes if "k8s/50-train.yaml" in pod.name)
    return copy.deepcopy(head), copy.deepcopy(worker)


def label(pod: Pod, name: str) -> str:
    """A label app.kubernetes.io/NAME of a pod."""
    return str(pod.document["metadata"]["labels"][f"app.kubernetes.io/{name}"])


def start_options(pod: Pod) -> dict[str, str]:
    """Of the ``ray start`` of a pod."""
    groups = [group for manifest in manifests.everything() for group in manifests.ray_groups(manifest.document)]
    (options,) = [
        g["rayStartParams"] for g in groups if {"kind": "Pod", "apiVersion": "v1", **g["template"]} == pod.document
    ]
    found: dict[str, str] = options
    return found


def test_all_pods_are_seen() -> None:
    components = sorted(label(pod, "component") for pod in pods)
    assert components == sorted(["head", "worker"] * 3 + ["submitter"] * 2 + ["tensorboard", "storage", "worker"])
    assert {label(pod, "part-of") for pod in pods} == {"autopainter"}


@each(pods)
def test_a_pod_is_allowed_under_the_restricted_profile(pod: Pod) -> None:
    assert manifests.not_restricted(pod) == []
    for container in pod.containers:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert {pod.spec["securityContext"][field] for field in ("runAsUser", "runAsGroup", "fsGroup")} == {1000}
    assert (pod.spec["automountServiceAccountToken"], pod.spec["enableServiceLinks"]) == (False, False)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda pod: pod["securityContext"].pop("runAsNonRoot"), "runAsNonRoot"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "seccompProfile"),
        (lambda pod: pod["initContainers"][0].pop("securityContext"), "container metrics: allowPrivilegeEscalation"),
        (lambda pod: pod["containers"][0]["securityContext"].update(privileged=True), "privileged"),
        (lambda pod: pod["containers"][0]["securityContext"].update(runAsUser=0), "runAsUser"),
        (
            lambda pod: pod["containers"][0]["securityContext"].update(capabilities={"drop": ["NET_RAW"]}),
            "capabilities",
        ),
        (lambda pod: pod["containers"][0]["ports"][0].update(hostPort=8080), "hostPort"),
        (lambda pod: pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}}), "volume host"),
        (lambda pod: pod.update(hostIPC=True), "hostIPC"),
    ],
)
def test_what_the_profile_forbids_is_found(change: Callable[[Document], object], problem: str) -> None:
    _, worker = head_and_workers()
    change(worker.spec)
    assert any(problem in found for found in manifests.not_restricted(worker))


@each(pods)
def test_containers_have_room_and_no_more(pod: Pod) -> None:
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    claims = {"data"} if label(pod, "component") == "storage" else set()
    for container in pod.containers:
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]  # is not killed for what others use
        assert "cpu" in resources["requests"]
        assert container["image"] == IMAGE
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert {"/tmp", "/home/autopainter"} <= mounts.keys()  # the root is read-only
        assert set(mounts.values()) <= volumes.keys() | claims
    for volume in volumes.values():
        assert "emptyDir" not in volume or volume["emptyDir"].get("sizeLimit"), volume["name"]


@each(ray_nodes)
def test_a_ray_node_has_time_to_leave(pod: Pod) -> None:
    environment = {entry["name"]: entry["value"] for entry in pod.containers[-1]["env"]}
    drain = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 0 < drain <= pod.spec["terminationGracePeriodSeconds"] - 30  # else the kernel's SIGKILL comes first
    assert 0 < float(environment["RAY_memory_usage_threshold"]) < 1
    assert "command" not in pod.containers[-1]  # the operator's: Ray must be process 1 to get SIGTERM


@each(ray_nodes)
def test_the_object_store_fits_into_shared_memory(pod: Pod) -> None:
    (shm,) = [volume["emptyDir"] for volume in pod.spec["volumes"] if volume["name"] == "shm"]
    assert shm["medium"] == "Memory"
    assert manifests.bytes_of(shm["sizeLimit"]) < manifests.bytes_of(
        pod.containers[-1]["resources"]["limits"]["memory"]
    )
    options = start_options(pod)
    # Ray would take 30 % of the pod's memory, and put it on disk where /dev/shm is smaller than that.
    assert int(options["object-store-memory"]) < manifests.bytes_of(shm["sizeLimit"])


@each([pod for pod in ray_nodes if label(pod, "component") == "head"])
def test_no_worker_runs_on_the_head(pod: Pod) -> None:
    options = start_options(pod)
    assert (options["num-cpus"], options["num-gpus"]) == ("0", "0")
    assert "nvidia.com/gpu" not in pod.containers[-1]["resources"]["limits"]
    assert pod.spec["priorityClassName"] == "autopainter-head"
    assert pod.spec["containers"][0]["name"] == "ray-head"  # the operator writes its command into the first


@each([pod for pod in ray_nodes if label(pod, "component") == "worker"])
def test_a_lost_worker_is_replaced(pod: Pod) -> None:
    assert pod.spec["restartPolicy"] == "Never"
    assert pod.spec["containers"][0]["name"] == "ray-worker"
    (spread,) = pod.spec["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= pod.document["metadata"]["labels"].items()


def test_head_comes_before_workers() -> None:
    head, worker = (manifests.one("PriorityClass", f"autopainter-{role}") for role in ("head", "worker"))
    assert head["value"] > worker["value"]
    assert {head["preemptionPolicy"], worker["preemptionPolicy"]} == {"Never"}


def test_the_interactive_cluster_is_that_of_the_training_job_under_another_name() -> None:
    one, other = (
        [_anonymous(pod.document) for pod in ray_nodes if label(pod, "instance") == name]
        for name in ("autopainter", "autopainter-interactive")
    )
    assert one == other


def _anonymous(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _anonymous(value) for key, value in part.items() if key != "app.kubernetes.io/instance"}
    return [_anonymous(value) for value in part] if isinstance(part, list) else part
