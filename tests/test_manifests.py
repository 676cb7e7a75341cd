"""The manifests of k8s/ as Kubernetes and KubeRay would judge them, offline:

    KUBERAY_CRD_DIR=folder/of/KubeRay/CRDs pytest tests/test_manifests.py

Core kinds and all pods by kubernetes-validate's schemas; RayJob and RayCluster by KubeRay's CRDs, with unknown fields
refused and CEL rules evaluated; the operator's own rules as assertions. No Kubernetes is needed or asked.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import kuberay
import kubernetes_validate
import manifests
import pytest
from kuberay import CustomResource
from manifests import K8S, Document, Manifest, Pod

VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
CORE = {
    "ConfigMap", "Deployment", "Job", "Namespace", "NetworkPolicy", "PodDisruptionBudget", "PriorityClass", "Secret",
    "Service", "ServiceAccount", "StatefulSet",
}  # fmt: skip
RAY = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}
OTHER = {  # by folder: operators of others, whose schemas are not checked here
    "kueue": {"ResourceFlavor", "ClusterQueue", "LocalQueue"},
    "monitoring": {"PodMonitor", "PrometheusRule"},
}

core = [m for m in manifests.everything() if m.document["kind"] in CORE]
ray = [m for m in manifests.everything() if m.document["kind"] in RAY]
pods = manifests.all_pods()


def each(parts: list[Manifest] | list[Pod]) -> pytest.MarkDecorator:
    """A test for each of them, by its name."""
    return pytest.mark.parametrize("part", parts, ids=[part.name for part in parts])


@pytest.fixture(scope="module")
def crd() -> Callable[[str], CustomResource]:
    """KubeRay's CRD of a kind."""
    folder = os.environ.get("KUBERAY_CRD_DIR")
    if not folder:
        pytest.skip("KUBERAY_CRD_DIR names no folder with KubeRay's CRDs, so RayJob and RayCluster were not validated")
    made = {kind: CustomResource(Path(folder) / f"ray.io_{plural}.yaml") for kind, plural in RAY.items()}
    return made.__getitem__


@pytest.fixture
def job() -> Document:
    """A copy of the training RayJob, to be broken."""
    return copy.deepcopy(manifests.one("RayJob", "autopainter"))


def test_every_manifest_is_of_a_kind_that_some_test_validates() -> None:
    for manifest in manifests.everything():
        known = CORE | RAY.keys() | OTHER.get(manifest.path.parent.name, set())
        assert manifest.document["kind"] in known, manifest.name


@pytest.mark.parametrize("version", VERSIONS)
def test_core_kinds_and_pods_are_valid_in_every_version(version: str) -> None:
    for part in [*core, *pods]:
        assert kubernetes_validate.validate(part.document, version, strict=True) == version, part.name


def test_an_unknown_field_of_a_pod_is_found(job: Document) -> None:
    (head,) = [pod for pod in manifests.pods(Manifest(K8S / "x.yaml", job)) if pod.name.endswith("head")]
    head.spec["terminationGracePeriod"] = 120  # it is ...Seconds
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(head.document, VERSIONS[0], strict=True)


@each(ray)
def test_ray_kinds_follow_the_crd(part: Manifest, crd: Callable[[str], CustomResource]) -> None:
    assert crd(part.document["kind"]).errors(part.document) == []


def test_a_typo_in_the_job_is_refused(job: Document, crd: Callable[[str], CustomResource]) -> None:
    job["spec"]["backofflimit"] = job["spec"].pop("backoffLimit")
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullpolicy"] = "Always"
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "two"
    del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"]
    errors = "\n".join(crd("RayJob").errors(job))
    for found in (
        "'backofflimit' was unexpected",
        "'imagePullpolicy' was unexpected",
        "'two' is not of type 'integer'",
    ):
        assert found in errors
    assert "'minReplicas' is a required property" in errors
    assert len(errors.splitlines()) == 4


def test_a_cel_violation_is_found(job: Document, crd: Callable[[str], CustomResource]) -> None:
    assert crd("RayJob").rules == 6
    job["spec"]["managedBy"] = "me"
    condition = {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed", "ttlSeconds": 60}
    job["spec"]["deletionStrategy"] = {"deletionRules": [{"policy": "DeleteCluster", "condition": condition}]}
    errors = crd("RayJob").errors(job)
    assert len(errors) == 2
    assert any(error.startswith("$.spec.managedBy: the managedBy field value must be") for error in errors)
    assert any("JobStatus and JobDeploymentStatus cannot be used together" in error for error in errors)
    del condition["jobStatus"], job["spec"]["managedBy"]
    assert crd("RayJob").errors(job) == []


@each(ray)
def test_the_operator_takes_it(part: Manifest) -> None:
    assert kuberay.operator_refuses(part.document) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda job: job["metadata"].update(name="a" * 48), "name"),
        (lambda job: job["metadata"].update(name="1run"), "name"),
        (lambda job: job["spec"].update(shutdownAfterJobFinishes=False), "needs shutdownAfterJobFinishes"),
        (lambda job: job["spec"].update(submissionMode="SidecarMode"), "SidecarMode takes no submitter"),
        (lambda job: job["spec"].update(submissionMode="InteractiveMode"), "excludes InteractiveMode"),
        (lambda job: job["spec"].update(runtimeEnvYAML="env_vars"), "no mapping"),
        (lambda job: job["spec"].pop("rayClusterSpec"), "neither rayClusterSpec"),
        (lambda job: job["spec"]["rayClusterSpec"].pop("rayVersion"), "token needs rayVersion"),
        (lambda job: job["spec"]["rayClusterSpec"].update(rayVersion="2.51.0"), "token needs rayVersion"),
        (lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"].update(resources={"CPU": "1"}), "both resources"),
    ],
)
def test_the_operator_refuses_what_is_broken(change: Callable[[Document], object], problem: str, job: Document) -> None:
    change(job)
    (found,) = kuberay.operator_refuses(job)
    assert problem in found


@each(ray)
def test_one_cluster_wide_token_is_required(part: Manifest) -> None:
    spec = part.document["spec"]
    options = spec.get("rayClusterSpec", spec)["authOptions"]
    # Without `mode` there would be no authentication; without `secretName` each try would make a token of its own.
    assert options == {"mode": "token", "secretName": "autopainter-ray-token"}


def test_jobs_are_tried_again_at_each_level() -> None:
    for name in ("autopainter", "autopainter-pack"):
        spec = manifests.one("RayJob", name)["spec"]
        assert spec["submissionMode"] == "K8sJobMode"  # the only one with a submitter that restricted pods allow
        assert spec["submitterConfig"]["backoffLimit"] >= 10  # one for each loss of the head
        assert spec["backoffLimit"] >= 3
        assert spec["preRunningDeadlineSeconds"] >= 1800
        assert spec["shutdownAfterJobFinishes"] is True
        assert not {"entrypointNumCpus", "entrypointNumGpus", "jobId", "suspend"} & spec.keys()
        assert "gcsFaultToleranceOptions" not in spec["rayClusterSpec"]  # the id of the lost job would be refused
        assert not spec["rayClusterSpec"].get("enableInTreeAutoscaling")


def test_disruption_budgets_can_be_computed(crd: Callable[[str], CustomResource]) -> None:
    """A budget with maxUnavailable needs pods whose owner has a scale subresource, else it blocks every eviction."""
    assert not crd("RayCluster").scalable
    budgets = [m.document for m in core if m.document["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == 2
    for budget in budgets:
        assert isinstance(budget["spec"].get("minAvailable"), int)
        assert "maxUnavailable" not in budget["spec"]
