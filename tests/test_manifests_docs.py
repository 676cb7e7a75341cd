"""What docs/kubernetes.md tells people to type names files, objects and options that exist."""

import re
import shlex
import subprocess
from collections.abc import Iterator

import click
import manifests
import pytest
from manifests import ROOT

from autopainter import cli

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


def commands() -> Iterator[list[str]]:
    """The words of each command in the page's bash blocks."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


def test_the_shell_understands_each_block() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 10
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_files_exist() -> None:
    named = re.findall(r"(?<![\w/.-])(?:k8s|scripts|job|tests)/[\w./-]*+(?!\*)", text)
    assert len(named) > 30
    for name in named:
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([\w.-]+\.md)", text):
        assert (PAGE.parent / link).exists(), link


def test_links_within_the_page_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.+)$", text, re.M)
    }
    wanted = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert len(wanted) > 8
    assert wanted <= anchors


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


def ours() -> Iterator[list[str]]:
    """The words after ``autopainter`` of the commands that call it, here or in a pod."""
    for command in commands():
        words = command[command.index("--") + 1 :] if "--" in command else command
        if words[:1] == ["autopainter"]:
            yield words[1:]


@pytest.mark.parametrize("words", list(ours()), ids=" ".join)
def test_our_own_commands_take_these_options(words: list[str]) -> None:
    command: click.Command = cli.cli
    while isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
    command.make_context(command.name, words)  # raises for an option that does not exist


def test_alerts_exist() -> None:
    (rules,) = [m.document["spec"] for m in manifests.everything() if m.document["kind"] == "PrometheusRule"]
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert set(re.findall(r"Autopainter\w+", text)) <= alerts
