"""Make the Grafana dashboard and the tables of docs/telemetry.md from the list of metrics and the alerts.

python scripts/dashboard.py          writes k8s/monitoring/dashboard.yaml and the tables
python scripts/dashboard.py --check  only says whether they are up to date; the exit code is 1 if not
"""

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from autopainter.telemetry import metric_list as metric
from autopainter.telemetry.metric_list import METRICS, Metric

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "k8s/monitoring/dashboard.yaml"
ALERTS = ROOT / "k8s/monitoring/alerts.yaml"
DOCS = ROOT / "docs/telemetry.md"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_CHOSEN = '{namespace=~"$namespace", run=~"$run"}'
_WIDTH, _HEIGHT = 8, 8  # of a panel, on Grafana's grid of 24 columns


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
        unit: as Grafana names it.
        queries: PromQL, and what its curves are called.
    """

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]


def _value(which: Metric) -> str:
    """A metric of the chosen runs, in as many curves as its labels make, whichever pod it comes from."""
    return f"max by ({', '.join(which.label_names)}) ({which.name}{_CHOSEN})"


def _rate(which: Metric) -> str:
    return f"max by ({', '.join(which.label_names)}) (rate({which.name}{_CHOSEN}[$__rate_interval]))"


def _curve(which: Metric, text: str = "") -> tuple[str, str]:
    """A query for a gauge's value or a counter's rate, and a name for its curves."""
    query = _rate(which) if which.kind == "counter" else _value(which)
    labels = [f"{{{{{label}}}}}" for label in which.label_names]
    return query, " ".join([*labels, text]).strip()


def _age(which: Metric) -> str:
    return f"time() - max by (run) ({_value(which)})"


_IMAGES_LEFT = (f"({_value(metric.TARGET_STEPS)} - {_value(metric.STEP)})"
                f" * {_value(metric.IMAGES)} / ({_value(metric.STEP)} > 0)")  # fmt: skip

ROWS: dict[str, Sequence[Panel]] = {
    "Progress": (
        Panel("Throughput", "none", [_curve(metric.IMAGES_PER_SECOND, "images/s")]),
        Panel("Images", "short", [(_value(metric.IMAGES), "{{run}}")]),
        Panel("Step, and the last one", "short", [_curve(metric.STEP), _curve(metric.TARGET_STEPS, "wanted")]),
        Panel("Time left", "s", [(f"{_IMAGES_LEFT} / ({_value(metric.IMAGES_PER_SECOND)} > 0)", "{{run}}")]),
        Panel("Age of the newest step and checkpoint", "s", [
            (_age(metric.LAST_STEP), "{{run}} step"), (_age(metric.LAST_CHECKPOINT), "{{run}} checkpoint"),
            (_value(metric.CHECKPOINT_MAX_AGE), "{{run}} most that is allowed"),
        ]),
        Panel("Starts and workers", "short", [_curve(metric.ATTEMPT, "start"), _curve(metric.WORKERS, "workers")]),
    ),
    "Losses": (
        Panel("Loss terms", "none", [_curve(metric.LOSS)]),
        Panel("Discriminator is right about", "percentunit", [_curve(metric.ACCURACY)]),
        Panel("Gradient norms", "none", [_curve(metric.GRADIENT_NORM)]),
        Panel("Learning rates", "none", [_curve(metric.LEARNING_RATE)]),
        Panel("Steps that were not finite", "none", [(_value(metric.NOT_FINITE), "{{run}}")]),
    ),
    "Data": (
        Panel("Share of the time that training waits for data", "percentunit", [_curve(metric.DATA_WAIT)]),
        Panel("Read from storage", "Bps", [_curve(metric.BYTES_READ)]),
        Panel("Batches that are ready", "short", [_curve(metric.READY_BATCHES)]),
        Panel("Chunks held", "bytes", [_curve(metric.HELD_BYTES)]),
        Panel("Chunk cache, a second", "none", [_curve(metric.CACHE_HITS, "hits"),
                                                _curve(metric.CACHE_MISSES, "misses")]),
    ),
    "Checkpoints and storage": (
        Panel("Newest checkpoint", "short", [_curve(metric.CHECKPOINT_STEP)]),
        Panel("Writing a checkpoint, beside training", "s", [_curve(metric.CHECKPOINT_SECONDS)]),
        Panel("Share of the time that training stands still for them", "percentunit",
              [_curve(metric.CHECKPOINT_STALL)]),
        Panel("Checkpoints that failed", "short", [(_value(metric.CHECKPOINT_FAILURES), "{{run}}")]),
        Panel("Storage operations repeated, a second", "none", [_curve(metric.RETRIES)]),
        Panel("Storage operations that failed for good", "short", [(_value(metric.STORAGE_ERRORS),
                                                                    "{{run}} {{rank}}")]),
    ),
    "Stops and memory": (
        Panel("What stopped the run", "short", [(_value(metric.STOPS), "{{run}} {{kind}}")]),
        Panel("Last step, last end on purpose", "dateTimeFromNow", [
            (f"1000 * {_value(metric.LAST_STEP)}", "{{run}} step {{rank}}"),
            (f"1000 * {_value(metric.LAST_END)}", "{{run}} end"),
        ]),
        Panel("Memory rung", "short", [_curve(metric.MEMORY_RUNG)]),
        Panel("GPU memory", "bytes", [_curve(metric.GPU_USED, "used"), _curve(metric.GPU_PEAK, "peak of tensors"),
                                      _curve(metric.GPU_TOTAL, "total")]),
        Panel("Memory of the workers", "bytes", [_curve(metric.RESIDENT)]),
        Panel("Memory of their containers or machines", "bytes", [_curve(metric.HOST_USED, "used"),
                                                                  _curve(metric.HOST_TOTAL, "total")]),
    ),
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row, members in ROWS.items():
        panels.append({"type": "row", "title": row, "collapsed": False, "panels": [],
                       "gridPos": {"h": 1, "w": 24, "x": 0, "y": top}})  # fmt: skip
        top += 1
        for number, panel in enumerate(members):
            place = {"h": _HEIGHT, "w": _WIDTH, "x": number * _WIDTH % 24, "y": top + number * _WIDTH // 24 * _HEIGHT}
            panels.append(_diagram(panel, place))
        top += -(-len(members) * _WIDTH // 24) * _HEIGHT
    for number, entry in enumerate(panels, 1):
        entry["id"] = number
    starts = {"name": "starts", "enable": True, "iconColor": "orange", "datasource": _SOURCE, "titleFormat": "start",
              "textFormat": "{{run}}", "expr": f"changes({metric.ATTEMPT.name}{{run=~\"$run\"}}[1m]) > 0"}  # fmt: skip
    return {
        "uid": "autopainter",
        "title": "Auto-Painter",
        "tags": ["autopainter"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "annotations": {"list": [starts]},
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
            _variable("namespace", f"label_values({metric.STEP.name}, namespace)"),
            _variable("run", f"label_values({metric.STEP.name}{{namespace=~\"$namespace\"}}, run)"),
        ]},
        "panels": panels,
    }  # fmt: skip


def _diagram(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + number), "expr": query, "legendFormat": name, "datasource": _SOURCE}
        for number, (query, name) in enumerate(panel.queries)
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {"fillOpacity": 5}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name, "type": "query", "datasource": _SOURCE, "query": {"query": query, "refId": name},
        "definition": query, "refresh": 2, "multi": True, "includeAll": True, "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def config_map() -> str:
    """The ConfigMap that Grafana's sidecar looks for."""
    head = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": "autopainter-dashboard",
            "namespace": "autopainter",
            "labels": {"app.kubernetes.io/part-of": "autopainter", "grafana_dashboard": "1"},
        },
    }
    body = textwrap.indent(json.dumps(dashboard(), indent=1), "    ")
    made = "# Made by scripts/dashboard.py from the list of metrics; do not edit.\n"
    return f"{made}{yaml.safe_dump(head, sort_keys=False)}data:\n  autopainter.json: |\n{body}\n"


def metrics_table() -> str:
    """The metrics for the docs."""
    lines = ["| metric | kind | of | labels | what it says |", "| --- | --- | --- | --- | --- |"]
    for entry in METRICS:
        labels = ", ".join(f"`{label}`" for label in entry.label_names)
        lines.append(f"| `{entry.name}` | {entry.kind} | {entry.of} | {labels} | {entry.help} |")
    return "\n".join(lines)


def alerts_table() -> str:
    """The alerts for the docs."""
    lines = ["| alert | severity | what it means | what to do |", "| --- | --- | --- | --- |"]
    for rule in yaml.safe_load(ALERTS.read_text())["spec"]["groups"][0]["rules"]:
        said = rule["annotations"]
        texts = (rule["alert"], rule["labels"]["severity"], said["description"], said["runbook"])
        lines.append("| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in texts) + " |")
    return "\n".join(lines)


def docs(text: str) -> str:
    """The docs with their tables made anew."""
    for name, table in (("metrics", metrics_table()), ("alerts", alerts_table())):
        begin, end = f"<!-- {name}: made by scripts/dashboard.py -->\n", f"\n<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        assert found, f"{name} has no place in the docs"
        assert closed, f"{name} has no end in the docs"
        text = f"{before}{begin}{table}{end}{after}"
    return text


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; the exit code is 1 if something is not up to date.")
def main(check: bool) -> None:
    """Write or compare."""
    wanted = {DASHBOARD: config_map(), DOCS: docs(DOCS.read_text())}
    old = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in old:
        click.echo(f"{path.relative_to(ROOT)} {'is not up to date' if check else 'written'}", err=check)
        if not check:
            path.write_text(wanted[path])
    sys.exit(1 if check and old else 0)


if __name__ == "__main__":
    main()
