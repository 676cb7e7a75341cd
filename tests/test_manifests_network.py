"""Who reaches whom: selectors of budgets and services, and the network policies, worked out as Kubernetes does."""

import itertools
from typing import NamedTuple

import manifests
from manifests import Document, Pod

pods = manifests.all_pods()
policies = [m.document["spec"] for m in manifests.everything() if m.document["kind"] == "NetworkPolicy"]


class Peer(NamedTuple):
    """A pod in another namespace; only its labels and the port that it asks for count."""

    namespace: str
    name: str


OPERATOR = Peer("kuberay-system", "kuberay-operator")
PROMETHEUS = Peer("monitoring", "prometheus")


def labels(pod: Pod) -> dict[str, str]:
    """Of a pod."""
    found: dict[str, str] = pod.document["metadata"]["labels"]
    return found


def matches(selector: Document, given: dict[str, str]) -> bool:
    """Whether a label selector takes these labels; of expressions only those of kind In."""
    return selector.get("matchLabels", {}).items() <= given.items() and all(
        given.get(expression["key"]) in expression["values"] for expression in selector.get("matchExpressions", [])
    )


def test_every_budget_finds_its_pods() -> None:
    for role, budget in {"head": "autopainter-head", "worker": "autopainter-workers"}.items():
        selector = manifests.one("PodDisruptionBudget", budget)["spec"]["selector"]
        (pod,) = [pod for pod in pods if matches(selector, labels(pod))]
        assert labels(pod)["app.kubernetes.io/component"] == role
        assert labels(pod)["app.kubernetes.io/instance"] == "autopainter"
    (workers,) = manifests.one("RayJob", "autopainter")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    least = manifests.one("PodDisruptionBudget", "autopainter-workers")["spec"]["minAvailable"]
    assert least == workers["replicas"] - 1  # one at a time


def test_every_service_finds_its_pod_and_port() -> None:
    for manifest in manifests.everything():
        if manifest.document["kind"] == "Service":
            spec = manifest.document["spec"]
            (pod,) = [pod for pod in pods if matches({"matchLabels": spec["selector"]}, labels(pod))]
            there = {port["name"] for port in pod.containers[-1]["ports"]}
            assert {port["targetPort"] for port in spec["ports"]} <= there


def _lets(side: str, of: Pod, other: Pod | Peer, port: int) -> bool:
    """Whether a policy of a pod allows traffic from (ingress) or to (egress) another one."""
    for policy in policies:
        if matches(policy["podSelector"], labels(of)):
            for rule in policy.get(side, []):
                if port in [entry["port"] for entry in rule.get("ports", [{"port": port}])]:
                    peers = rule.get("from" if side == "ingress" else "to")
                    if peers is None or any(_is(other, peer) for peer in peers):
                        return True
    return False


def _is(other: Pod | Peer, peer: Document) -> bool:
    namespace = other.namespace if isinstance(other, Peer) else "autopainter"
    given = {"app.kubernetes.io/name": other.name} if isinstance(other, Peer) else labels(other)
    if "ipBlock" in peer or not matches(peer.get("podSelector", {}), given):
        return False
    if "namespaceSelector" in peer:
        return matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    return namespace == "autopainter"


def test_everything_is_closed_first() -> None:
    (deny,) = [
        policy for policy in policies if policy["podSelector"] == {} and set(policy) == {"podSelector", "policyTypes"}
    ]
    assert deny["policyTypes"] == ["Ingress", "Egress"]


def test_the_network_lets_through_what_is_needed_and_nothing_else() -> None:
    places = ("k8s/50-train.yaml", "k8s/40-tensorboard.yaml", "k8s/storage/")
    ours = {labels(pod)["app.kubernetes.io/component"]: pod for pod in pods if pod.name.startswith(places)}
    assert ours.keys() == {"head", "worker", "submitter", "tensorboard", "storage"}
    ports = (6006, 6379, 8080, 8265, 8333, 8888, 9333, 9400, 10001, 44217, 44227)
    through = {
        (one, other, port)
        for one, other, port in itertools.product(ours, ours, ports)
        if _lets("egress", ours[one], ours[other], port) and _lets("ingress", ours[other], ours[one], port)
    }
    among_nodes = set(itertools.product(("head", "worker"), ("head", "worker"), ports))
    assert through - among_nodes == {
        ("submitter", "head", 8265), ("head", "storage", 8333), ("worker", "storage", 8333),
        ("tensorboard", "storage", 8333),
    }  # fmt: skip
    assert among_nodes <= through  # Ray, NCCL and gloo choose ports at random
    for peer, targets in {
        OPERATOR: {("head", 8265)},
        PROMETHEUS: set(itertools.product(("head", "worker"), (8080, 9400, 44217, 44227))),
        Peer("default", "anything"): set(),
        Peer("kuberay-system", "anything"): set(),
    }.items():
        assert {(role, port) for role in ours for port in ports if _lets("ingress", ours[role], peer, port)} == targets


def test_storage_in_the_cloud_and_identities_can_be_reached() -> None:
    for pod in pods:
        component = labels(pod)["app.kubernetes.io/component"]
        assert _lets("egress", pod, Peer("anywhere", "S3"), 443) == (component in ("head", "worker", "tensorboard"))
