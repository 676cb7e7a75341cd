"""A real Prometheus for the tests, of Debian's package prometheus."""

import json
import shutil
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import HOST, Service, free_ports

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not here; it is in Debian's package of that name"
)
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Prometheus(Service):
    """Prometheus that scrapes some ports of this machine each second.

    Args:
        folder: for its configuration and its data.
        targets: ports.
        groups: groups of rules, evaluated each second.
    """

    kind = "prometheus"

    def __init__(self, folder: Path, targets: Sequence[int], groups: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(detach=False)
        self._folder = folder
        self.port = free_ports(1)[0]
        folder.mkdir(parents=True, exist_ok=True)
        job = {"job_name": "workers", "static_configs": [{"targets": [f"{HOST}:{port}" for port in targets]}]}
        (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": list(groups)}))
        settings = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [job],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        options = {
            "config.file": self._folder / "prometheus.yml",
            "storage.tsdb.path": self._folder / "data",
            "web.listen-address": f"{HOST}:{self.port}",
        }
        command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
        return command, {}, self._folder / "log"

    def _probe(self) -> None:
        self._get("/-/ready")

    def query(self, promql: str) -> list[dict[str, Any]]:
        """The result of an instant query."""
        found: list[dict[str, Any]] = self.get("query", query=promql)["result"]
        return found

    def get(self, what: str, **parameters: str) -> dict[str, Any]:
        """Ask the HTTP API."""
        answer = json.loads(self._get(f"/api/v1/{what}?{urllib.parse.urlencode(parameters)}"))
        assert answer["status"] == "success", answer
        data: dict[str, Any] = answer["data"]
        return data

    def _get(self, path: str) -> bytes:
        with _http.open(f"http://{HOST}:{self.port}{path}", timeout=10) as response:
            body: bytes = response.read()
        return body
