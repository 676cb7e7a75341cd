"""The rows of the fault table that need a cluster: stops, drained nodes, hangs, memory, rendezvous, two starts at once.

The faults are real: signals to real processes, memory that is really taken, nodes that are really drained; only the
failed rendezvous is raised by hand (tests/faulty_job.py).
Run: pytest tests/test_job_faults.py
"""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import JobSettings
from driving import RARELY, Driver, assert_same_state, final_state, saved
from services import RayCluster, RayNode, SeaweedFS, show_memory
from waiting import PATIENCE_SECONDS, until

from autopainter import journal, storage


def faulty(fault: str, folder: Path, settings: list[str]) -> Driver:
    """A driver whose workers have a fault of tests/faulty_job.py."""
    return Driver(settings, (sys.executable, "tests/faulty_job.py", fault, str(folder)))


# Stopped on purpose


def test_a_run_that_is_interrupted_saves(ray: RayCluster, job_settings: JobSettings) -> None:
    """By Ctrl-C; that a run that SIGTERM stopped ends in the same weights is shown by the chaos run."""
    settings, run = job_settings(2)
    driver = Driver([*settings, *RARELY, "train.steps=100000"])
    driver.wait_for(r"step 5/")
    os.killpg(driver.process.pid, signal.SIGINT)  # as a terminal does
    output = driver.finish(130)
    (step,) = saved(run)
    assert f"stopped at the checkpoint of step {step}; the same command continues" in output
    assert int(re.findall(r"step (\d+)/", output)[-1]) == step  # nothing is lost
    assert "starting again" not in output
    assert [entry.kind for entry in journal.read(storage.open_store(run))] == ["stopped"]


def test_a_stop_before_any_worker_trains_ends_at_once(ray: RayCluster, job_settings: JobSettings) -> None:
    settings, run = job_settings(2)
    driver = Driver([*settings, "cluster.cpus_per_worker=100"])  # it waits for a larger cluster
    driver.wait_for("waiting until it has more")
    driver.wait_for("Attempting to start")
    driver.process.terminate()
    assert "stopped at the checkpoint of step 0" in driver.finish(143)
    assert saved(run) == []


# Ended by a fault


def test_a_hanging_worker_is_replaced(
    ray: RayCluster, job_settings: JobSettings, undisturbed: str, tmp_path: Path
) -> None:
    settings, run = job_settings(2)
    output = faulty("hang", tmp_path, [*settings, "cluster.collective_timeout_seconds=10"]).finish()
    assert "starting again" in output
    assert journal.counts(storage.open_store(run))["hang"] >= 1  # also a worker that a busy machine starves hangs
    assert_same_state(final_state(run), final_state(undisturbed))


def test_a_failed_rendezvous_is_tried_again(
    ray: RayCluster, job_settings: JobSettings, undisturbed: str, tmp_path: Path
) -> None:
    settings, run = job_settings(2)
    output = faulty("rendezvous", tmp_path, settings).finish()
    assert "no rendezvous: connection refused" in output
    assert_same_state(final_state(run), final_state(undisturbed))


def test_a_diverged_run_is_not_tried_again(ray: RayCluster, job_settings: JobSettings, tmp_path: Path) -> None:
    settings, run = job_settings(2)
    output = faulty("nan", tmp_path, settings).finish(1)
    assert re.search(r"^job/train.py: step 4: generator/gradient_norm not finite", output, re.MULTILINE)
    assert "starting again" not in output
    assert saved(run)[-1] == 3
    store = storage.open_store(run)
    assert len(json.loads(store.read("diverged/00000004.json"))["samples"]) == 8


def test_a_second_start_of_the_same_run_takes_over(ray: RayCluster, job_settings: JobSettings, tmp_path: Path) -> None:
    """Of the first one's checkpoints Ray hears meanwhile."""
    settings, run = job_settings(1)
    settings = [*settings, "train.steps=100000"]
    first = Driver(settings, TMPDIR=str(tmp_path))

    def heard() -> bool:
        """Ray writes the file in place, so that it may be read empty."""
        snapshots = tmp_path.glob("autopainter-ray-*/job/checkpoint_manager_snapshot.json")
        told = "".join(path.read_text() for path in snapshots)
        return bool(re.search(rf"{run}/checkpoints/\d{{8}}\.json", told)) and "generator/loss" in told

    first.wait_for("checkpoint of step")
    until(heard)
    second = Driver(settings)
    second.wait_for("checkpoint of step")
    output = first.finish(1)
    assert re.search(r"^job/train.py: .* attempt 2 has taken over from this attempt 1", output, re.MULTILINE)
    second.process.terminate()
    second.finish(143)


# Nodes


@pytest.fixture
def nodes(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes worker nodes of a cluster whose head has no cores for workers."""
    env = dict(s3.env) | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "30"}
    made: list[RayNode] = []
    cluster = RayCluster(num_cpus=0, dashboard=False, env=env, host="127.0.0.2").start()

    def make(meminfo: Path | None = None, **extra: str) -> RayNode:
        made.append(RayNode(cluster, f"127.0.0.{len(made) + 3}", num_cpus=2, env=env | extra, meminfo=meminfo))
        return made[-1].start()

    try:
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        yield make
    finally:
        for service in (*made, cluster):
            service.kill()  # a head that is stopped takes its time to drain


def test_a_drained_node_costs_no_step(nodes: Callable[..., RayNode], job_settings: JobSettings) -> None:
    settings, run = job_settings(2)
    leaving = nodes()
    driver = Driver([*settings, *RARELY, "telemetry.image_every_steps=1000", "train.steps=100000"])
    driver.wait_for(r"step 3/")
    os.kill(leaving.pid, signal.SIGTERM)  # as the kubelet does when a pod is deleted
    driver.wait_for("a node that runs a worker is taken away")
    (step,) = saved(run)
    nodes()
    driver.wait_for(f"continuing run {run} from its checkpoint of step {step}")
    driver.wait_for(f"step {step + 3}/")
    driver.process.terminate()
    seen = [int(number) for number in re.findall(r"step (\d+)/", driver.finish(143))]
    assert seen == list(range(1, len(seen) + 1))  # each step once
    assert journal.counts(storage.open_store(run)) == {"preempted": 1, "stopped": 1}


@pytest.mark.skipif(not RayNode.can_mount(), reason="no right to mount")
def test_a_worker_that_ray_kills_for_memory_is_replaced_and_takes_less(
    nodes: Callable[..., RayNode], job_settings: JobSettings, undisturbed: str, tmp_path: Path
) -> None:
    """The node is shown a full memory: no other test's memory is taken."""
    settings, run = job_settings(2)
    show_memory(tmp_path / "meminfo", used=0.3)
    nodes(tmp_path / "meminfo", RAY_memory_monitor_refresh_ms="100")
    driver = faulty("host memory", tmp_path, settings)
    until((tmp_path / "host memory").exists, PATIENCE_SECONDS)  # the fourth step
    show_memory(tmp_path / "meminfo", used=0.99)
    driver.wait_for("the worker group failed")
    show_memory(tmp_path / "meminfo", used=0.3)
    output = driver.finish()
    assert "host out of memory: level 1" in output
    assert "data.prefetch_batches=" in output
    assert journal.counts(storage.open_store(run))["host memory"] == 1
    assert_same_state(final_state(run), final_state(undisturbed))
