"""The job on a real Ray cluster with real storage: workers and drivers killed, workers added, a job submitted.

Reference: an undisturbed run of the same configuration, to which the disturbed ones must be bit-identical.
Run: pytest tests/test_job.py
"""

import os
import random
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from services import RayCluster
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autopainter import checkpoint, storage

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40
pytestmark = pytest.mark.usefixtures("ray")


class Driver:
    """One call of job/train.py whose output is read line by line."""

    def __init__(self, settings: list[str], program: tuple[str, ...] = (sys.executable, "job/train.py")) -> None:
        options = [option for setting in settings for option in ("--set", setting)]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*program, "--config", "job/configs/quickstart.yaml", *options],
            cwd=ROOT, env=os.environ | {"RAY_DEDUP_LOGS": "0"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read on until a line matches; an early end of the program fails the test with its output."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match
        pytest.fail(f"no line matches {pattern!r}:\n{''.join(self.lines)}")

    def finish(self) -> str:
        """Wait for success; the whole output."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout.readlines()
        output = "".join(self.lines)
        assert self.process.wait(timeout=300) == 0, output
        return output


def final_state(run: str) -> checkpoint.Tensors:
    store = storage.open_store(run)
    found = checkpoint.newest(store)
    assert found is not None
    assert found[0].step == STEPS
    return found[1]


def scalars(run: str, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalar curves as TensorBoard shows them."""
    store = storage.open_store(run)
    for entry in store.list("events/"):
        path = folder / entry.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(entry.key))
    events = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def settings(dataset: str, feature_weights: tuple[str, str]) -> Callable[[int], tuple[list[str], str]]:
    """Makes the settings of a new run, and its URI, for a number of workers."""

    def make(workers: int) -> tuple[list[str], str]:
        place = f"s3://runs/{uuid.uuid4().hex}"
        return [
            "run.name=job", f"run.storage={place}", f"data.manifest={dataset}", "data.image_size=32",
            "model.generator_width=8", "model.discriminator_width=8", f"train.steps={STEPS}", "train.global_batch=8",
            f"loss.vgg_weights={feature_weights[0]}", f"loss.vgg_sha256={feature_weights[1]}",
            "train.precision=float32", "train.threads=1", "checkpoint.every_seconds=0", "telemetry.images=2",
            "telemetry.log_every_steps=1", "telemetry.image_every_steps=20", f"cluster.workers={workers}",
        ], f"{place}/job"  # fmt: skip

    return make


Settings = Callable[[int], tuple[list[str], str]]


@pytest.fixture(scope="module")
def undisturbed(settings: Settings) -> str:
    """URI of a finished run of two workers."""
    options, run = settings(2)
    Driver(options).finish()
    return run


def assert_same_state(one: checkpoint.Tensors, other: checkpoint.Tensors) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert differing == []


def test_a_killed_worker_is_replaced_and_changes_nothing(settings: Settings, undisturbed: str, tmp_path: Path) -> None:
    options, run = settings(2)
    driver = Driver(options)
    workers = [int(driver.wait_for(rf"pid=(\d+)\) world_rank={rank}")[1]) for rank in (0, 1)]
    driver.wait_for(rf"checkpoint of step {random.randint(2, STEPS - 10)} saved")
    os.kill(random.choice(workers), signal.SIGKILL)
    output = driver.finish()
    assert "starting again" in output
    assert re.search(r"continuing run \S+ from its checkpoint of step \d+", output)
    assert_same_state(final_state(run), final_state(undisturbed))
    mine, reference = scalars(run, tmp_path / "a"), scalars(undisturbed, tmp_path / "b")
    assert mine == reference
    assert [step for step, _ in mine["generator/loss"]] == list(range(1, STEPS + 1))


def test_a_killed_driver_is_continued_by_the_same_command(settings: Settings, undisturbed: str) -> None:
    options, run = settings(2)
    driver = Driver(options)
    driver.wait_for(rf"checkpoint of step {random.randint(2, STEPS - 10)} saved")
    driver.process.kill()
    driver.process.wait()
    output = Driver(options).finish()
    assert re.search(r"continuing run \S+ from its checkpoint of step \d+", output)
    assert_same_state(final_state(run), final_state(undisturbed))
    again = Driver(options).finish()
    assert f"is finished: {STEPS} steps done" in again
    assert "RayTrainWorker" not in again


def test_one_worker_sees_the_same_batches_as_two(settings: Settings, undisturbed: str, tmp_path: Path) -> None:
    """Each logged loss is a mean over the global batch: other samples, crops, hints or masks would show in it."""
    options, run = settings(1)
    Driver(options).finish()
    one, two = scalars(run, tmp_path / "one"), scalars(undisturbed, tmp_path / "two")
    assert one.keys() == two.keys()
    for step in range(10):  # float addition in another order grows from step to step, as in any training
        assert one["generator/loss"][step][1] == pytest.approx(two["generator/loss"][step][1], rel=1e-4)
        assert one["discriminator/loss"][step][1] == pytest.approx(two["discriminator/loss"][step][1], rel=1e-3)


def test_a_run_resumes_on_another_number_of_workers(settings: Settings, undisturbed: str, tmp_path: Path) -> None:
    options, run = settings(2)
    Driver([*options, "train.steps=6"]).finish()
    output = Driver([*options, "cluster.workers=4"]).finish()
    assert "continuing run" in output
    mine, reference = scalars(run, tmp_path / "a"), scalars(undisturbed, tmp_path / "b")
    assert [step for step, _ in mine["generator/loss"]] == list(range(1, STEPS + 1))
    assert mine["generator/loss"][:6] == reference["generator/loss"][:6]
    for step in range(6, 12):
        assert mine["generator/loss"][step][1] == pytest.approx(reference["generator/loss"][step][1], rel=1e-4)


def test_a_changed_model_is_refused_before_any_worker_starts(settings: Settings, undisturbed: str) -> None:
    options, _ = settings(2)
    storage_of = undisturbed.removesuffix("/job")
    driver = Driver([*options, f"run.storage={storage_of}", "model.generator_width=16"])
    output = driver.process.communicate()[0]
    assert driver.process.returncode == 2
    assert "model.generator_width: the run" in output
    assert "begun with 8, now it is 16" in output
    assert "RayTrainWorker" not in output


def test_a_fault_in_the_code_ends_after_failures_without_progress(settings: Settings, dataset: str) -> None:
    """A shard that is gone after the preflight fails every start; the run must end by itself and name it."""
    options, _ = settings(1)
    data = storage.open_store(dataset.rpartition("/")[0])
    copy = storage.open_store(f"s3://datasets/{uuid.uuid4().hex}")
    for entry in data.list():
        if entry.key != "train-00001.tar":
            copy.write(entry.key, data.read(entry.key))
    driver = Driver([*options, f"data.manifest={copy.locate('manifest.json')}", "cluster.max_failures=1"])
    output = driver.process.communicate()[0]
    assert driver.process.returncode == 1, output
    assert "train-00001.tar: not found" in output
    assert "giving up: 2 failures in a row without a new checkpoint" in output


def test_ray_job_submit(ray: RayCluster, settings: Settings, undisturbed: str) -> None:
    options, run = settings(2)
    ray_program = str(Path(sys.executable).parent / "ray")
    driver = Driver(
        options, (ray_program, "job", "submit", "--working-dir", ".", "--", sys.executable, "job/train.py")
    )  # fmt: skip
    output = driver.finish()
    assert "succeeded" in output
    assert_same_state(final_state(run), final_state(undisturbed))
