"""Scraping, for the tests of the metrics: what an endpoint or a folder of workers' files says."""

import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from processes import HOST
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from waiting import PATIENCE_SECONDS

from autopainter.telemetry.metric_server import FolderCollector

Samples = dict[tuple[str, ...], float]


def parse(text: str) -> Samples:
    """What an exposition says: (name, run, other labels) -> value."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            first = [sample.labels.pop(label) for label in ("run", "rank") if label in sample.labels]
            key = (sample.name, *first, *sample.labels.values())
            assert key not in samples
            samples[key] = sample.value
    return samples


def exposition(folder: Path) -> str:
    registry = CollectorRegistry()
    registry.register(FolderCollector(folder))
    return generate_latest(registry).decode()


def collect(folder: Path) -> Samples:
    return parse(exposition(folder))


def get(port: int, path: str = "/metrics") -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{HOST}:{port}{path}", timeout=PATIENCE_SECONDS) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text: str = response.read().decode()
    return text


def check(text: str) -> None:
    """What Prometheus' own linter says."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not here; it is in Debian's package prometheus")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
