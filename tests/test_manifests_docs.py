"""docs/kubernetes.md names objects, labels and alerts that exist, and what it does to the manifests fits together.

That its commands, files and links are right otherwise: tests/test_docs.py.
"""

import re
import shutil
import subprocess
from pathlib import Path

import manifests
import pytest
import yaml
from manifests import ROOT

from autopainter import config as configuration

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


def block_with(text_in_it: str) -> str:
    """The only block of commands that has the text."""
    (found,) = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if text_in_it in block]
    return str(found)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the manifests, in which commands that change them may run."""
    shutil.copytree(manifests.K8S, tmp_path / "project/k8s")
    return tmp_path / "project"


def shell(folder: Path, commands: str) -> str:
    return subprocess.run(["bash", "-euc", commands], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_image_is_named_in_every_pod_however_often_it_changes(copy: Path) -> None:
    line = next(line for line in block_with("docker push").splitlines() if line.startswith("grep -rl"))
    for tag in ("one", "two-dirty"):
        shell(copy, f"IMAGE=registry:5000/team/auto-painter:{tag}; {line}")
        for path in (copy / "k8s").rglob("*.yaml"):
            was = (manifests.K8S / path.relative_to(copy / "k8s")).read_text()
            assert path.read_text() == was.replace(manifests.IMAGE, f"registry:5000/team/auto-painter:{tag}")


def test_the_openmoji_drawings_are_packed_to_where_the_run_looks_for_them(copy: Path) -> None:
    command = block_with("openmoji").partition("|")[0]
    job = yaml.safe_load(shell(copy, command))
    assert job["spec"]["entrypoint"] == "python job/pack.py openmoji s3://datasets/cartoons"


def test_a_second_run_has_its_own_objects_and_nothing_of_the_first(copy: Path) -> None:
    shell(copy, block_with("../second").replace("kubectl apply", "true"))
    made = [each for path in sorted((copy.parent / "second").iterdir()) for each in manifests.load(path)]
    names = {(each.document["kind"], each.document["metadata"]["name"]) for each in made}
    assert len(names) == 4
    assert not names & objects
    (job,) = [each.document["spec"] for each in made if each.document["kind"] == "RayJob"]
    (settings,) = [each.document for each in made if each.document["kind"] == "ConfigMap"]
    assert yaml.safe_load(settings["data"]["train.yaml"])["run"]["name"] == "second"
    used = re.findall(r"'configMap': {'name': '([\w-]+)'", str(job))
    assert set(used) == {settings["metadata"]["name"]}
    labels = [
        group["template"]["metadata"]["labels"]
        for group in (job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"])
    ]
    budgets = [each.document["spec"] for each in made if each.document["kind"] == "PodDisruptionBudget"]
    for budget in budgets:
        assert [budget["selector"]["matchLabels"].items() <= label.items() for label in labels].count(True) == 1
    assert {label["app.kubernetes.io/instance"] for label in labels} == {"autopainter-second"}


def test_the_recipe_for_a_node_of_eight_gpus_is_one_that_starts(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"For a node with eight: (.*)", text)
    settings = re.findall(r"`(\w+\.\w+): (\d+)`", recipe)
    assert len(settings) == 2
    (tmp_path / "train.yaml").write_text(manifests.one("ConfigMap", "autopainter-config")["data"]["train.yaml"])
    config = configuration.load(
        tmp_path / "train.yaml", [f"{field}={value}" for field, value in settings], environment={}
    )
    config.check_world(8, "cluster.workers")
    assert config.cluster.workers == 8
