"""The run of ``cluster_e2e.py`` as people see it: the job's log, Prometheus and TensorBoard."""

import dataclasses
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from e2e_manifests import Manifests
from e2e_pods import Pod
from processes import HOST, Service, free_ports

_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our network
_REQUEST_SECONDS = 10.0
_EARLY_SECONDS = 2.0
"""Less than what lies between the last step of a start and the first one of the next."""


@dataclasses.dataclass
class Attempt:
    """A start of the run, as the log shows it; times are of ``time.monotonic()``."""

    number: int
    start: int
    last: int
    saved: int = 0
    times: dict[int, float] = dataclasses.field(default_factory=dict)


class RunLog:
    """What the job's log has said of a run.

    Args:
        clock: seconds, when lines are taken over.
    """

    def __init__(self, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begins = re.compile(rf"run {re.escape(run)}, attempt (\d+): steps (\d+) to ")
        self.attempts: list[Attempt] = []

    @property
    def current(self) -> Attempt | None:
        """The start that was seen last."""
        return self.attempts[-1] if self.attempts else None

    def feed(self, lines: Iterable[str]) -> None:
        """Take over lines. A new submitter shows the job's log from its beginning, so a start may come again."""
        for line in lines:
            attempt = self.current
            if found := self._begins.search(line):
                if attempt is None or int(found[1]) > attempt.number:
                    self._begin(int(found[1]), int(found[2]))
            elif attempt and (found := re.search(r"\bstep (\d+)/\d+ ", line)) and int(found[1]) > attempt.last:
                attempt.last = int(found[1])
                attempt.times[attempt.last] = self._clock()
            elif attempt and (found := re.search(r"checkpoint of step (\d+) saved", line)):
                attempt.saved = max(attempt.saved, int(found[1]))

    def _begin(self, number: int, start: int) -> None:
        """A start. The driver may have shown its first steps before the worker's line came."""
        new, now = Attempt(number, start, last=start), self._clock()
        if old := self.current:
            early = {step: seen for step, seen in old.times.items() if step > start and now - seen < _EARLY_SECONDS}
            old.times = {step: seen for step, seen in old.times.items() if step not in early}
            old.last = max(old.times, default=old.start)
            new.times, new.last = early, max(early, default=start)
        self.attempts.append(new)

    def first_beyond(self, attempt: Attempt) -> float | None:
        """When the first step was seen that is beyond all of ``attempt``, in a later start."""
        later = [other for other in self.attempts if other.number > attempt.number]
        return min((seen for other in later for step, seen in other.times.items() if step > attempt.last), default=None)


class Prometheus(Service):
    """A Prometheus that scrapes what the PodMonitors of the manifests name, with their alerting rules loaded."""

    kind = "prometheus"

    def __init__(self, manifests: Manifests, folder: Path) -> None:
        super().__init__(detach=False)
        self._monitors, self._folder = manifests.of_kind("PodMonitor"), folder
        self._port = free_ports(1)[0]
        folder.mkdir(parents=True, exist_ok=True)
        groups = [group for item in manifests.of_kind("PrometheusRule") for group in item["spec"]["groups"]]
        (folder / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))
        discovery = {"files": [str(folder / "targets.json")], "refresh_interval": "2s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump({
            "global": {"scrape_interval": "2s", "evaluation_interval": "5s"},
            "rule_files": [str(folder / "rules.yml")],
            "scrape_configs": [{"job_name": "pods", "file_sd_configs": [discovery]}],
        }))  # fmt: skip
        self._shown = ""
        self.show([])

    def show(self, pods: Iterable[Pod]) -> None:
        """Tell it of the pods that are there now, as the Prometheus operator's discovery does."""
        targets = []
        for monitor in self._monitors:
            wanted = monitor["spec"]["selector"]["matchLabels"].items()
            names = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
            for pod in pods:
                spec = pod.template.spec
                containers = [*spec.get("initContainers", []), *spec["containers"]]
                ports = {
                    port.get("name"): port["containerPort"] for item in containers for port in item.get("ports", [])
                }
                if wanted <= pod.template.labels.items():
                    targets += [(f"{pod.ip}:{ports[name]}", pod.template.name, name) for name in names]
        entries = json.dumps(
            [{"targets": [address], "labels": {"pod": pod, "endpoint": name}} for address, pod, name in targets]
        )
        if entries != self._shown:
            new = self._folder / "targets.json.new"
            new.write_text(entries)
            new.replace(self._folder / "targets.json")
            self._shown = entries

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        return [
            "prometheus", f"--config.file={self._folder}/prometheus.yml", f"--storage.tsdb.path={self._folder}/data",
            f"--web.listen-address={HOST}:{self._port}",
        ], {}, self._folder / "prometheus.log"  # fmt: skip

    def _probe(self) -> None:
        _http.open(f"http://{HOST}:{self._port}/-/ready", timeout=_REQUEST_SECONDS).close()

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of an expression, now."""
        answer = get_json(f"http://{HOST}:{self._port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        return [(item["metric"], float(item["value"][1])) for item in answer["data"]["result"]]

    def value(self, expression: str) -> float | None:
        """The greatest value of an expression; None if it has none."""
        return max((value for _, value in self.query(expression)), default=None)


def get_json(url: str) -> Any:
    """What an address answers. ``OSError`` if it does not."""
    with _http.open(url, timeout=_REQUEST_SECONDS) as answer:
        return json.load(answer)


def tensorboard_steps(url: str, run: str, tag: str) -> list[int]:
    """The steps of a run's curve, as a TensorBoard shows it; none if it does not."""
    tags = get_json(f"{url}/data/plugin/scalars/tags")
    for name in tags:
        if name.split("/")[0] == run and tag in tags[name]:
            asked = urllib.parse.urlencode({"run": name, "tag": tag})
            return [int(step) for _, step, _ in get_json(f"{url}/data/plugin/scalars/scalars?{asked}")]
    return []
