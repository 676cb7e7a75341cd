"""What a checkpoint costs training: ours, to a folder and to S3, torch.save in the loop, and Ray Train's report().

All methods save the state of one real ``Trainer`` in one process: the one worker of a ``TorchTrainer`` on a Ray
cluster of this machine, so that ``report()`` is the real thing. They take turns in an order that is random in each
round. Before each save some steps are timed with nothing going on; after it, steps are timed until the checkpoint is
durable and the method's background work is done, so no save waits for the one before. The server (SeaweedFS) shares
the machine: its work is part of what slows the steps beside an upload, and an object counts as durable when the server
says so. Needs about six minutes on two cores, 12 GB of disk, and a quiet machine.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from measuring import bench_config, cpu
from processes import ServiceError, child_env
from savers import BUCKET, DURABLE_SECONDS, METHODS, Saver, make_saver
from services import RayCluster, SeaweedFS

from autopainter.cgroup import Groups
from autopainter.data.stream import Batch
from autopainter.models.unet import levels_for
from autopainter.trainer import Trainer

RAY_SECONDS = "0.5"
"""How often Ray Train's controller looks at its workers and commits what they reported (its default: 2)."""


@dataclass(frozen=True)
class Spec:
    """What is measured.

    Attributes:
        methods: names in ``METHODS``.
        size: edge of the pictures that the model is made for.
        width: channels of the first level of both networks.
        steps: steps that are timed before each save.
        checkpoints: saves of a method in a row in each round.
        rounds: turns that all methods take.
        device: "cpu" or "cuda".
        folder: for all that is written to disk; its file ``results`` gets a JSON line for each save.
    """

    methods: tuple[str, ...]
    size: int
    width: int
    steps: int
    checkpoints: int
    rounds: int
    device: str
    folder: str


class Training:
    """A real trainer with a state of full size, and steps on the smallest picture that its networks take."""

    def __init__(self, spec: Spec) -> None:
        self.device = torch.device(spec.device)
        config = bench_config({
            "data.image_size": spec.size, "model.generator_width": spec.width, "model.discriminator_width": spec.width,
            "train.global_batch": 1, "loss.feature_weight": 0,
        })  # fmt: skip
        self.trainer = Trainer(config, self.device)
        edge = 1 << levels_for(spec.size)  # the innermost map is 1x1; the state does not depend on it
        draw = torch.Generator().manual_seed(0)
        sketch, color, hint = (
            torch.randint(0, 256, (1, channels, edge, edge), generator=draw, dtype=torch.uint8)
            for channels in (1, 3, 4)
        )
        hint[:, 3] = 0
        self.batch = Batch(0, ["sample"], sketch, color, hint, torch.zeros(1, dtype=torch.int64))
        self.done = 0

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self) -> float:
        """Do one step; its seconds."""
        began = time.monotonic()
        self.trainer.step(self.done, self.batch)
        self.synchronize()
        self.done += 1
        return time.monotonic() - began


def measure(training: Training, saver: Saver, steps: int) -> dict[str, Any]:
    """One save: its stall, the time until it is durable, and the steps before it and beside it."""
    os.sync()  # what the save before has left to the page cache would be written during this one
    quiet = [training.step() for _ in range(steps)]
    saver.durable_at = None
    began = time.monotonic()
    saver.save(training.done, training.trainer.state())
    training.synchronize()
    stall = time.monotonic() - began
    beside: list[float] = []
    while not saver.settled():
        beside.append(training.step())
        if time.monotonic() - began > DURABLE_SECONDS:
            raise TimeoutError(f"not durable after {DURABLE_SECONDS:.0f} s")
    assert saver.durable_at is not None
    saver.clean()
    return {"stall": stall, "durable": saver.durable_at - began, "quiet": quiet, "beside": beside}


def measure_all(spec: Spec) -> None:
    """Measure all methods in turns; a method that fails is told and left out from then on."""
    torch.set_num_threads(Groups().usable_cores())  # Ray sets OMP_NUM_THREADS
    training = Training(spec)
    folder = Path(spec.folder)
    order = random.Random(0)
    savers: dict[str, Saver] = {}
    with (folder / "results").open("w", buffering=1) as results:

        def tell(**line: Any) -> None:
            results.write(json.dumps(line) + "\n")

        def attempt(name: str, work: Callable[[], None]) -> None:
            try:
                work()
            except Exception as error:
                savers.pop(name, None)
                tell(method=name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

        def begin(name: str) -> None:
            savers[name] = make_saver(name, folder)
            # Modules, clients and threads are made at the first save: let that be one of a small state.
            savers[name].save(0, {"average.small": torch.zeros(1), "small": torch.zeros(1)})
            began = time.monotonic()
            while not savers[name].settled():
                time.sleep(0.01)
                if time.monotonic() - began > DURABLE_SECONDS:
                    raise TimeoutError("the first save is not durable")
            savers[name].clean()

        def run(name: str) -> None:
            for _ in range(spec.checkpoints):
                tell(method=name, **measure(training, savers[name], spec.steps))

        training.step()
        state = training.trainer.state()
        tell(tensors=len(state), bytes=sum(tensor.nbytes for tensor in state.values()))
        del state
        for name in spec.methods:
            attempt(name, lambda name=name: begin(name))  # type: ignore[misc]
        for _ in range(3):
            training.step()  # the first ones allocate
        began = time.monotonic()
        for number in range(spec.rounds):
            for name in order.sample(list(savers), len(savers)):
                attempt(name, lambda name=name: run(name))  # type: ignore[misc]
            print(f"round {number + 1} of {spec.rounds}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def ray_worker(spec: dict[str, Any]) -> None:
    """What the one worker of the ``TorchTrainer`` runs."""
    measure_all(Spec(**spec))


def measure_in_ray(spec: Spec, server: SeaweedFS) -> None:
    """``measure_all`` in a worker of Ray Train, on a cluster that is gone afterwards."""
    cores, gpus = Groups().usable_cores(), int(spec.device == "cuda")
    settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": RAY_SECONDS, "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    with RayCluster(num_cpus=cores, num_gpus=gpus, dashboard=False, env={**server.env, **settings}) as cluster:
        os.environ.update({**cluster.env, **settings})  # read when Ray is imported

        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        ours = signal.getsignal(signal.SIGTERM)
        ray.init(logging_level=logging.WARNING)
        signal.signal(signal.SIGTERM, ours)  # Ray puts one in its place that ends the process without any cleaning up
        try:
            TorchTrainer(
                ray_worker,
                train_loop_config=asdict(spec),
                scaling_config=ScalingConfig(
                    num_workers=1, use_gpu=bool(gpus), resources_per_worker={"CPU": cores, "GPU": gpus}
                ),
                run_config=RunConfig(
                    name="bench", storage_path=f"s3://{BUCKET}/ray", failure_config=FailureConfig(max_failures=0)
                ),
            ).fit()
        finally:
            ray.shutdown()


def results_of(folder: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    path = folder / "results"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def row(name: str, saves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values of a method, one for each save; each is compared with the quiet steps just before it."""
    quiets = [statistics.median(save["quiet"]) for save in saves]
    pairs = list(zip(saves, quiets, strict=True))
    return {
        "method": name,
        "stall_ms": [save["stall"] * 1000 for save in saves],
        "durable_s": [save["durable"] for save in saves],
        "slowdown": [statistics.mean(save["beside"]) / quiet for save, quiet in pairs if save["beside"]],
        "lost_ms": [(save["stall"] + sum(step - quiet for step in save["beside"])) * 1000 for save, quiet in pairs],
        "quiet_step_ms": [quiet * 1000 for quiet in quiets],
        "steps_beside": [len(save["beside"]) for save in saves],
    }


def _cell(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    low, high = (format(value, form) for value in (min(values), max(values)))
    return f"{statistics.median(values):{form}} ({low} - {high})"


def table(rows: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]) -> str:
    """Markdown: medians with their range."""
    lines = [
        "| method | stall, ms | s to durable | steps beside it | training lost, ms | commit | verified |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for values in rows:
        method = METHODS[values["method"]]
        slower = _cell(values["slowdown"], ".2f") + " x" if values["slowdown"] else "none"
        lines.append(
            f"| {method.title} | {_cell(values['stall_ms'], '.0f')} | {_cell(values['durable_s'], '.2f')} | {slower}"
            f" | {_cell(values['lost_ms'], '.0f')} | {method.commit} | {method.verified} |"
        )
    lines += [f"| {METHODS[name].title} | not measured: {reason} | | | | | |" for name, reason in skipped.items()]
    return "\n".join(lines)


LEGEND = """
Medians (lowest - highest) over all saves. stall: time in the save call. s to durable: from the call to the commit; for
ours that includes reading all of it back. steps beside it: time of the steps during the background work, over that of
the steps just before the save. training lost: stall and what those steps took longer, together."""


def machine(device: str) -> dict[str, str]:
    """What it ran on."""
    versions = []
    for name in ("torch", "boto3", "safetensors", "ray", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    found = {"cpu": cpu(), "python": platform.python_version(), "packages": ", ".join(versions)}
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def _enter_environment(env: Mapping[str, str]) -> None:
    """Give this process the environment of a service's client, without the user's own S3 account and cluster."""
    clean = child_env(env)
    for name in set(os.environ) - set(clean):
        del os.environ[name]
    os.environ.update(clean)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".replace("|", "/")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", default=512, show_default=True, help="Edge of the pictures that the model is made for.")
@click.option("--width", default=64, show_default=True, help="Channels of the first level of both networks.")
@click.option("--steps", default=4, show_default=True, help="Steps timed before each save.")
@click.option("--checkpoints", default=1, show_default=True, help="Saves of a method in a row in each round.")
@click.option("--rounds", default=3, show_default=True, help="Times that all methods take their turn.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--only", default=",".join(METHODS), show_default=True, help="Methods to compare.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for all values.")
def bench_checkpoint(
    size: int, width: int, steps: int, checkpoints: int, rounds: int, device: str, only: str, json_file: Path | None
) -> None:
    """Compare ways to save a checkpoint on this machine, and print a Markdown table."""
    wanted = tuple(only.split(","))
    if unknown := set(wanted) - METHODS.keys():
        raise click.BadParameter(f"unknown: {', '.join(sorted(unknown))}")
    skipped: dict[str, str] = {}

    def without(need: str, reason: str) -> None:
        skipped.update({name: reason for name in wanted if need in METHODS[name].needs})

    def spec(folder: Path) -> Spec:
        names = tuple(name for name in wanted if name not in skipped)
        return Spec(names, size, width, steps, checkpoints, rounds, device, str(folder))

    with contextlib.ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ap-bench-", dir="/tmp")))
        server = SeaweedFS(folder / "storage", buckets=(BUCKET,))
        try:
            cleanup.enter_context(server)
            _enter_environment(server.env)
        except (ServiceError, OSError) as error:
            without("s3", f"no S3 server: {_why(error)}")
        measured = False
        if any("ray" in METHODS[name].needs for name in spec(folder).methods):
            try:
                (folder / "ray").mkdir()
                measure_in_ray(spec(folder / "ray"), server)
                found, measured = results_of(folder / "ray"), True
            except Exception as error:  # no Ray here, or it does not start or fails: the others are still measured
                without("ray", f"Ray Train: {_why(error)}")
                shutil.rmtree(folder / "ray")
        if not measured:
            (folder / "alone").mkdir()
            measure_all(spec(folder / "alone"))
            found = results_of(folder / "alone")
    skipped |= {line["method"]: line["error"].replace("|", "/") for line in found if "error" in line}
    saves = {name: [line for line in found if line.get("method") == name and "stall" in line] for name in wanted}
    rows = [row(name, saves[name]) for name in wanted if saves[name] and name not in skipped]
    size_of = next(line for line in found if "tensors" in line)
    about = machine(device)
    quiet = [value for values in rows for value in values["quiet_step_ms"]]
    click.echo(
        f"{size_of['bytes'] / 1e6:.0f} MB in {size_of['tensors']} tensors; {checkpoints} checkpoints of each method in"
        f" each of {rounds} rounds; a step without a save: {_cell(quiet, '.0f')} ms; {about['cpu']};"
        f" {about.get('gpu', 'no GPU')}; Python {about['python']}; {about['packages']}; Ray Train looks at its workers"
        f" each {RAY_SECONDS} s\n\n{table(rows, skipped)}\n{LEGEND}"
    )
    if json_file:
        found_all = {"machine": about, "state": size_of, "rounds": rounds, "checkpoints": checkpoints, "rows": rows}
        json_file.write_text(json.dumps({**found_all, "not_measured": skipped}, indent=1))


def _terminate(*_: object) -> None:
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    bench_checkpoint()
