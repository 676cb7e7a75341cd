"""Two workers that train under a real Prometheus; one is killed, and both are started again.

Reference: Prometheus and promtool of Debian's package prometheus. Run: pytest tests/test_metrics_run.py
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from processes import HOST, child_env, free_ports
from prometheus_server import Prometheus, needs_prometheus
from scraping import Samples, check, get, parse
from waiting import PATIENCE_SECONDS

from autopainter.telemetry.metric_list import METRICS

PROGRAM = str(Path(sys.executable).parent / "autopainter")
STEPS, BATCH = 24, 8
COUNTERS = {metric.name for metric in METRICS if metric.kind == "counter"}


class Workers:
    """Two processes that train together, as torchrun would start them."""

    def __init__(self, settings: list[str], folder: Path) -> None:
        self._options = [part for setting in settings for part in ("--set", setting)]
        self._folder = folder
        (folder / "empty.yaml").write_text("{}")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *more: str) -> None:
        options = [*self._options, *(part for setting in more for part in ("--set", setting))]
        (port,) = free_ports(1)
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
        aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        for rank in ("0", "1"):
            with (self._folder / f"worker{rank}.log").open("ab") as log:
                self.processes.append(
                    subprocess.Popen(
                        [PROGRAM, "train", "--config", str(self._folder / "empty.yaml"), *options],
                        env=child_env(aws | group | {"RANK": rank, "LOCAL_RANK": rank}), stdout=log, stderr=log,
                    )
                )  # fmt: skip

    def end(self) -> list[int]:
        """Exit codes, once all have ended."""
        codes = [process.wait(timeout=PATIENCE_SECONDS) for process in self.processes]
        self.processes.clear()
        return codes

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self._folder.glob("worker*.log")))


@pytest.fixture
def workers(small_settings: list[str], tmp_path: Path) -> Iterator[Workers]:
    changes = [
        f"train.steps={STEPS}",
        f"train.global_batch={BATCH}",
        f"telemetry.metrics_folder={tmp_path / 'metrics'}",
    ]
    (tmp_path / "metrics").mkdir()
    made = Workers([*small_settings, *changes, "telemetry.image_every_steps=100"], tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()


@pytest.fixture
def port(tmp_path: Path, workers: Workers) -> Iterator[int]:
    """Port of ``autopainter metrics`` of the workers' folder, which still is empty."""
    (port,) = free_ports(1)
    command = [PROGRAM, "metrics", "--folder", str(tmp_path / "metrics"), "--port", str(port), "--host", HOST]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as serving:
        assert serving.stderr
        serving.stderr.readline()
        yield port
        serving.terminate()
        assert serving.wait(timeout=PATIENCE_SECONDS) == 0


class Watch:
    """What a scraper sees: every sample over time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.curves: dict[tuple[str, ...], list[float]] = defaultdict(list)

    def look(self) -> Samples:
        samples = parse(get(self._port))
        for key, value in samples.items():
            self.curves[key].append(value)
        return samples

    def until(self, condition: Callable[[Samples], object]) -> Samples:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition(samples := self.look()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return samples


def queries() -> dict[str, list[str]]:
    """Every query of every panel, with the dashboard's variables filled in."""
    board = yaml.safe_load((ROOT / "k8s/monitoring/dashboard.yaml").read_text())
    found = {}
    for panel in json.loads(board["data"]["autopainter.json"])["panels"]:
        texts = [target["expr"] for target in panel.get("targets", ())]
        for variable, value in (("$namespace", ".*"), ("$run", "small"), ("$__rate_interval", "10m")):
            texts = [text.replace(variable, value) for text in texts]
        found[panel["title"]] = texts
    return found


def alert_groups() -> Any:
    return yaml.safe_load((ROOT / "k8s/monitoring/alerts.yaml").read_text())["spec"]["groups"]


@needs_prometheus
def test_a_run_is_seen_through_a_killed_worker_to_its_end(workers: Workers, port: int, tmp_path: Path) -> None:
    watch = Watch(port)
    step = ("autopainter_step", "small")
    with Prometheus(tmp_path / "prometheus", [port], alert_groups()) as prometheus:
        workers.start("train.steps=100000")  # however slowly it is watched
        read = [("autopainter_data_read_bytes_total", "small", rank) for rank in ("0", "1")]
        watch.until(lambda samples: samples.get(step, 0) >= 4 and all(samples.get(key) for key in read))
        workers.processes[1].kill()
        assert [code == 0 for code in workers.end()] == [False, False]
        dead = watch.look()
        assert dead[step] >= 4, workers.log()
        workers.start()
        watch.until(lambda samples: samples.get(("autopainter_attempt", "small"), 0) == 2)
        while workers.processes[0].poll() is None:
            watch.look()
            time.sleep(0.1)
        assert workers.end() == [0, 0], workers.log()
        last = watch.look()
        watch.until(lambda _: prometheus.query("autopainter_last_end_timestamp_seconds > 0"))
        for title, texts in queries().items():
            for text in texts:
                data = prometheus.query(text)
                assert bool(data) != ("gpu_memory" in text), f"{title}: {text}"
        seen = prometheus.query('sum by (rank) (autopainter_data_read_bytes_total{run="small"})')
        assert {entry["metric"]["rank"] for entry in seen} == {"0", "1"}
        assert prometheus.query(f"autopainter_step == {STEPS}")
        falls = prometheus.query('{__name__=~"autopainter_.*_total"}')
        for series in falls:
            name = "{" + ", ".join(f'{label}="{value}"' for label, value in series["metric"].items()) + "}"
            assert prometheus.query(f"resets({name}[10m])")[0]["value"][1] == "0", name
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        assert len(rules) == len(alert_groups()[0]["rules"])
        assert {rule["health"] for rule in rules} == {"ok"}
        assert {rule["name"] for rule in rules if rule["state"] == "firing"} == set()

    assert last["autopainter_images_total", "small"] == STEPS * BATCH
    end = ("autopainter_last_end_timestamp_seconds", "small")
    assert last[end] > dead[end] == 0
    assert last["autopainter_workers", "small"] == 2
    counters = {key: curve for key, curve in watch.curves.items() if key[0] in COUNTERS}
    assert len(counters) > 15
    assert {key for key, curve in counters.items() if curve != sorted(curve)} == set()
    for key in read:
        assert 0 < dead[key] < counters[key][-1]
    assert len(list((tmp_path / "metrics").iterdir())) == 2
    check(get(port))
