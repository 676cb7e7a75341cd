"""The alert rules, the dashboard and the docs' tables, against the list of metrics and Prometheus' own tool.

Reference: promtool, of Debian's package prometheus. Run: pytest tests/test_alerts.py
"""

import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import dashboard
import pytest
import yaml
from conftest import ROOT
from waiting import PATIENCE_SECONDS

from autopainter.telemetry.metric_list import METRICS

MONITORING = ROOT / "k8s" / "monitoring"
CASES = ROOT / "tests" / "alert_cases.yaml"
NAMES = {metric.name for metric in METRICS}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not here; it is in Debian's package prometheus"
)


def groups() -> list[dict[str, Any]]:
    loaded = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    found: list[dict[str, Any]] = loaded["spec"]["groups"]
    return found


RULES = [rule for group in groups() for rule in group["rules"]]


def promtool(*arguments: object) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}))
    promtool("check", "rules", "--lint=all", "--lint-fatal", tmp_path / "rules.yaml")


@needs_promtool
def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path: Path) -> None:
    rules = groups()
    for rule in (rule for group in rules for rule in group["rules"]):
        rule["annotations"] = {"summary": rule["annotations"]["summary"]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": rules}))
    shutil.copy(CASES, tmp_path)
    promtool("test", "rules", tmp_path / CASES.name)


@needs_promtool
def test_a_wrong_expectation_is_noticed(tmp_path: Path) -> None:
    """The test above is no test if promtool passes whatever it is given."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}))
    (tmp_path / CASES.name).write_text(CASES.read_text().replace("12m 0s", "13m 0s"))
    with pytest.raises(AssertionError, match="13m 0s"):
        promtool("test", "rules", tmp_path / CASES.name)


def test_each_alert_has_cases_in_which_it_fires_and_in_which_it_does_not() -> None:
    cases: dict[str, set[bool]] = defaultdict(set)
    for test in yaml.safe_load(CASES.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            cases[case["alertname"]].add(bool(case.get("exp_alerts")))
    assert cases == {rule["alert"]: {True, False} for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_alert_says_what_it_means_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert "{{" not in rule["annotations"]["description"] + rule["annotations"]["runbook"]
    used = set(re.findall(r"(?:autopainter|kuberay)_\w+", rule["expr"]))
    assert used
    assert used <= NAMES | {"kuberay_job_deployment_status"}


def test_fields_that_runbooks_name_exist() -> None:
    from autopainter.config import fields

    sections = {name.split(".")[0] for name in fields()}
    texts = " ".join(rule["annotations"]["runbook"] for rule in RULES)
    named = {name for name in re.findall(r"\b([a-z]+\.[a-z_]+)\b", texts) if name.split(".")[0] in sections}
    assert len(named) > 5
    assert named <= set(fields())


def board() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((MONITORING / "dashboard.yaml").read_text())
    assert loaded["metadata"]["labels"]["grafana_dashboard"] == "1"
    found: dict[str, Any] = json.loads(loaded["data"]["autopainter.json"])
    return found


def test_the_dashboard_is_what_the_list_of_metrics_makes() -> None:
    assert (MONITORING / "dashboard.yaml").read_text() == dashboard.config_map(), "call scripts/dashboard.py"


def test_the_docs_hold_the_tables_of_metrics_and_alerts() -> None:
    text = dashboard.DOCS.read_text()
    assert text == dashboard.docs(text), "call scripts/dashboard.py"


def test_every_metric_is_in_the_dashboard() -> None:
    queries = " ".join(target["expr"] for panel in board()["panels"] for target in panel.get("targets", ()))
    assert set(re.findall(r"autopainter_\w+", queries)) == NAMES


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_what_is_scraped_is_declared_by_the_pods() -> None:
    pods: dict[str, set[str]] = {}
    for document in yaml.safe_load_all((ROOT / "k8s" / "50-train.yaml").read_text()):
        cluster = document["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            labels = group["template"]["metadata"]["labels"]
            spec = group["template"]["spec"]
            containers = [*spec["containers"], *spec.get("initContainers", ())]
            pods[labels["app.kubernetes.io/component"]] = {
                port["name"] for container in containers for port in container.get("ports", ())
            }
    monitors = list(yaml.safe_load_all((MONITORING / "pod-monitors.yaml").read_text()))
    for monitor in monitors:
        labels = monitor["spec"]["selector"]["matchLabels"]
        assert labels["app.kubernetes.io/part-of"] == "autopainter"
        ports = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        assert ports <= pods[labels["app.kubernetes.io/component"]]
    assert len(monitors) == 2
