"""docs/kubernetes.md names objects, labels and alerts that exist. Its commands, files and links: tests/test_docs.py."""

import re

import manifests
from manifests import ROOT

PAGE = ROOT / "docs" / "kubernetes.md"
text = PAGE.read_text()
# The operator makes them, and calls them RESOURCE-head-svc.
OF_THE_OPERATOR = {
    "svc/autopainter-head-svc",
    "svc/autopainter-interactive-head-svc",
}
SHORT = {"svc": "Service", "deploy": "Deployment", "deployment": "Deployment", "statefulset": "StatefulSet",
         "rayjob": "RayJob", "secret": "Secret"}  # fmt: skip
objects = {(m.document["kind"], m.document["metadata"]["name"]) for m in manifests.everything()}


def test_every_folder_of_manifests_is_described_and_applied() -> None:
    for folder in (path.name for path in manifests.K8S.iterdir() if path.is_dir()):
        assert f"| `k8s/{folder}/` |" in text
        assert folder == "examples" or re.search(rf"kubectl apply -f k8s/{folder}/", text), folder


def test_objects_exist() -> None:
    named = re.findall(r"\b(svc|deploy|deployment|statefulset|rayjob|secret)[ /](autopainter[\w-]*)", text)
    assert len(named) > 15
    for short, name in named:
        assert (SHORT[short], name) in objects or f"{short}/{name}" in OF_THE_OPERATOR, (short, name)
    made = re.findall(r"create secret generic (\S+) +(?:\\\n +)?--from-literal=(\w+)", text)
    assert {name for name, _ in made} == {name for kind, name in objects if kind == "Secret"}
    for name, key in made:
        assert key in manifests.one("Secret", name)["stringData"]


def test_labels_that_select_are_labels_of_pods() -> None:
    pods = [pod.document["metadata"]["labels"] for pod in manifests.all_pods()]
    selectors = re.findall(r"-l (app\.kubernetes\.io/\S+?)[ \"|)\n]", text)
    assert len(selectors) >= 3
    for selector in selectors:
        wanted = dict(part.split("=") for part in selector.split(","))
        assert len([labels for labels in pods if wanted.items() <= labels.items()]) == 1, selector


def test_alerts_exist() -> None:
    (rules,) = [m.document["spec"] for m in manifests.everything() if m.document["kind"] == "PrometheusRule"]
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert set(re.findall(r"Autopainter\w+", text)) <= alerts
