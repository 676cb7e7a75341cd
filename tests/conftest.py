"""Real parts that the tests share: an S3 server, a small packed data set, feature weights, a Ray cluster."""

import contextlib
import hashlib
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import hypothesis
import numpy as np
import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from driving import JOB, STEPS, Driver  # noqa: E402
from services import RayCluster, SeaweedFS  # noqa: E402
from waiting import complaints  # noqa: E402

from autopainter import cli  # noqa: E402
from autopainter import config as configuration  # noqa: E402
from autopainter.config import Config  # noqa: E402
from autopainter.data import pack, sources  # noqa: E402
from autopainter.models.vgg import VGGFeatures  # noqa: E402
from autopainter.storage import LocalStore, Store, open_store  # noqa: E402

# Examples take as long as the machine is busy.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")
torch.set_num_threads(1)  # other processes share the cores, and OpenMP's barriers wait for each of its threads


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A running SeaweedFS with the buckets ``datasets`` and ``runs``; its credentials are in ``os.environ``."""
    with pytest.MonkeyPatch.context() as patch, SeaweedFS(tmp_path_factory.mktemp("weed")) as server:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def s3_uri(s3: SeaweedFS) -> str:
    """A fresh prefix on the S3 server."""
    return f"s3://datasets/{uuid.uuid4().hex}"


@pytest.fixture
def runs_uri(s3: SeaweedFS) -> str:
    """A fresh prefix for runs on the S3 server."""
    return f"s3://runs/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """The empty store of a run, once in a folder and once on the S3 server."""
    if request.param == "folder":
        return open_store(str(tmp_path / "run"))
    return open_store(request.getfixturevalue("runs_uri"))


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    """The empty store of a run in a folder."""
    return LocalStore(str(tmp_path / "run"))


class Done(NamedTuple):
    """What a command of ``autopainter`` came to."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command in this process."""

    def run(*command: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["autopainter", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(int(str(ended.value.code)), *capfd.readouterr())

    return run


@pytest.fixture
def succeed(call: Callable[..., Done]) -> Callable[..., str]:
    """Run a command that must say nothing on stderr but its progress; its output."""

    def run(*command: object, **options: object) -> str:
        done = call(*command, **options)
        assert (done.returncode, complaints(done.stderr)) == (0, "")
        return done.stdout

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    with contextlib.ExitStack() as stack:
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system may be mounted here: {error}")
        stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
        yield folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 90 small cartoons: coloured shapes with dark outlines."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(90):
        image = np.full((48, 48, 3), 255, np.uint8)
        for _ in range(3):
            center = tuple(int(v) for v in random.integers(8, 40, 2))
            color = tuple(int(v) for v in random.integers(40, 230, 3))
            radius = int(random.integers(5, 14))
            cv2.circle(image, center, radius, color, -1)
            cv2.circle(image, center, radius, (20, 20, 20), 1)
        cv2.imwrite(str(folder / f"shape{number:03d}.png"), image)
    return folder


@pytest.fixture(scope="session")
def dataset(s3: SeaweedFS, pictures: Path) -> str:
    """URI of the manifest of the pictures, packed on the S3 server: several small shards with uneven chunks."""
    uri = f"s3://datasets/{uuid.uuid4().hex}"
    options = pack.PackOptions(shard_samples=32, validation=0.1)
    pack.pack(sources.ColorImages(str(pictures), size=48), uri, options, workers=1)
    return f"{uri}/manifest.json"


@pytest.fixture(scope="session")
def feature_weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Path and sha256 of a feature network with random weights: of the real shape, and made without a download."""
    torch.manual_seed(0)
    data = safetensors.torch.save(VGGFeatures("relu2_2").state_dict())
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    path.write_bytes(data)
    return str(path), hashlib.sha256(data).hexdigest()


@pytest.fixture
def small_settings(dataset: str, runs_uri: str, feature_weights: tuple[str, str]) -> list[str]:
    """``field=value`` texts of a run that takes a fraction of a second a step and uses every part."""
    return [
        "run.name=small", f"run.storage={runs_uri}", f"data.manifest={dataset}", "data.image_size=32",
        "data.prefetch_batches=2", "model.generator_width=8", "model.discriminator_width=8",
        f"loss.vgg_weights={feature_weights[0]}", f"loss.vgg_sha256={feature_weights[1]}",
        "train.steps=12", "train.global_batch=8", "train.precision=float32", "train.threads=1",
        "checkpoint.every_seconds=0", "telemetry.log_every_steps=1", "telemetry.image_every_steps=10",
        "telemetry.images=4", "cluster.workers=2",
    ]  # fmt: skip


@pytest.fixture
def small(small_settings: list[str]) -> Config:
    """The configuration of ``small_settings``."""
    return configuration.load(None, small_settings, environment={})


@pytest.fixture(scope="session")
def ray(s3: SeaweedFS) -> Iterator[RayCluster]:
    """A running Ray cluster of one node; its address is in ``os.environ``."""
    with pytest.MonkeyPatch.context() as patch, RayCluster(4, dashboard=False, env=dict(s3.env)) as cluster:
        for name, value in cluster.env.items():
            patch.setenv(name, value)
        yield cluster


JobSettings = Callable[[int], tuple[list[str], str]]


@pytest.fixture(scope="session")
def job_settings(dataset: str, feature_weights: tuple[str, str]) -> JobSettings:
    """Makes the settings of a new run of the job, and its URI, for a number of workers."""

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


class Finished(NamedTuple):
    """A finished run: its settings, its URI, and what its driver said, in JSON."""

    settings: list[str]
    uri: str
    log: str


@pytest.fixture(scope="session")
def finished(ray: RayCluster, job_settings: JobSettings) -> Finished:
    """A run of two workers that nothing happened to."""
    settings, uri = job_settings(2)
    return Finished(settings, uri, Driver(settings, (*JOB, "--log-format", "json")).finish())


@pytest.fixture(scope="session")
def undisturbed(finished: Finished) -> str:
    """URI of that run."""
    return finished.uri


@pytest.fixture(autouse=True)
def _no_driver_left() -> Iterator[None]:
    yield
    while Driver.started:
        Driver.started.pop().kill()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(configuration.ENVIRONMENT_PREFIX):
            monkeypatch.delenv(name)
