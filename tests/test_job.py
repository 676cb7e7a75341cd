"""The job on a real Ray cluster with real storage: what its driver says, other numbers of workers, bad input.

Reference: an undisturbed run of the same configuration, to which the disturbed ones must be bit-identical.
Run: pytest tests/test_job.py
"""

import uuid
from pathlib import Path

import pytest
from conftest import Finished, JobSettings
from driving import STEPS, Driver, final_state, scalars
from test_logs import records, steps

from autopainter import storage

pytestmark = pytest.mark.usefixtures("ray")


def test_a_finished_run_is_left_as_it_is(finished: Finished) -> None:
    """That the command of a killed driver continues its run to the same weights is shown by the chaos run."""
    output = Driver(finished.settings).finish()
    assert f"is finished: {STEPS} steps done" in output
    assert "RayTrainWorker" not in output


def test_the_drivers_json_has_the_workers_lines_too(finished: Finished) -> None:
    log = records(finished.log)
    assert steps(log)[:20] == list(range(1, 21))  # Ray may lose the last, which a worker prints as it ends
    (one,) = [record for record in log if record["message"] == "checkpoint of step 2 saved"]
    assert {"time", "level", "logger", "pid", "ip", "process"} <= one.keys()


def test_one_worker_sees_the_same_batches_as_two(job_settings: JobSettings, undisturbed: str, tmp_path: Path) -> None:
    """Each logged loss is a mean over the global batch: other samples, crops, hints or masks would show in it."""
    options, run = job_settings(1)
    Driver(options).finish()
    one, two = scalars(run, tmp_path / "one"), scalars(undisturbed, tmp_path / "two")
    assert one.keys() == two.keys()
    for step in range(10):  # float addition in another order grows from step to step, as in any training
        assert one["generator/loss"][step][1] == pytest.approx(two["generator/loss"][step][1], rel=1e-4)
        assert one["discriminator/loss"][step][1] == pytest.approx(two["discriminator/loss"][step][1], rel=1e-3)


def test_a_run_resumes_on_other_numbers_of_workers(job_settings: JobSettings, undisturbed: str, tmp_path: Path) -> None:
    """20 steps agree to 1e-4, those after each change among them; after all of them the weights to 1e-2."""
    options, run = job_settings(1)
    for workers, end in ((2, 8), (4, 16), (1, STEPS)):
        output = Driver([*options, f"train.steps={end}", f"cluster.workers={workers}"]).finish()
        assert f"on {workers} worker(s)" in output
    assert f"continuing run {run} from its checkpoint of step 16" in output
    mine, reference = scalars(run, tmp_path / "a"), scalars(undisturbed, tmp_path / "b")
    assert [step for step, _ in mine["generator/loss"]] == list(range(1, STEPS + 1))
    for step in range(20):
        assert mine["generator/loss"][step][1] == pytest.approx(reference["generator/loss"][step][1], rel=1e-4)
    one, other = final_state(run), final_state(undisturbed)
    differences = [float((one[name] - other[name]).abs().max()) for name in one if name.startswith("average.")]
    assert 0 < max(differences) < 1e-2


def test_a_changed_model_is_refused_before_any_worker_starts(job_settings: JobSettings, undisturbed: str) -> None:
    options, _ = job_settings(2)
    storage_of = undisturbed.removesuffix("/job")
    driver = Driver([*options, f"run.storage={storage_of}", "model.generator_width=16"])
    output = driver.process.communicate()[0]
    assert driver.process.returncode == 2
    assert "model.generator_width: the run" in output
    assert "begun with 8, now it is 16" in output
    assert "RayTrainWorker" not in output


def test_a_fault_in_the_code_ends_after_failures_without_progress(job_settings: JobSettings, dataset: str) -> None:
    """A shard that is gone after the preflight fails every start; the run must end by itself and name it."""
    options, _ = job_settings(1)
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
