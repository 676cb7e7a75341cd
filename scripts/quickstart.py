"""The main job on this machine, with every part real: storage, packing, Ray, training, painting.

Everything it makes is in one folder; it leaves no process behind unless --keep-running is given.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
from processes import child_env, free_ports, stop_recorded
from services import RayCluster, SeaweedFS, TensorBoard

from autopainter.cgroup import Groups
from autopainter.processor import BFLOAT16_CAPABILITY, fast_precision

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path("job/configs/quickstart.yaml")
CPU_WORKERS = 2
BUCKETS = "datasets", "autopainter"
SERVICES = "services.jsonl"
STOP_SECONDS = 120  # more than cluster.stop_seconds


class Stages:
    """Announces each stage and remembers how long it took."""

    def __init__(self, install_seconds: float) -> None:
        self.seconds = {"install": install_seconds}

    @contextlib.contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """Time one stage."""
        click.secho(f"\n== {text}", bold=True, err=True)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began

    def table(self) -> str:
        """Seconds of each stage and their sum."""
        rows = [*self.seconds.items(), ("total", sum(self.seconds.values()))]
        return "\n".join(f"  {name:<12}{seconds:7.1f} s" for name, seconds in rows)


def main_job(folder: Path, size: int, steps: int | None, keep_running: bool, stages: Stages) -> None:
    """Storage, data, weights, training and painting; every step of it may have been done before."""
    run, manifest = f"quickstart-{size}", f"s3://datasets/openmoji-{size * 3 // 2}/manifest.json"
    weights = "s3://datasets/weights/vgg16-relu2_2.safetensors"
    services_file, hardware = folder / SERVICES, _hardware_settings()
    with contextlib.ExitStack() as services:
        with stages.stage("storage", "Starting object storage (SeaweedFS) on loopback"):
            access_key, secret_key = _credentials(folder)
            storage = SeaweedFS(folder / "storage", BUCKETS, access_key, secret_key, detach=keep_running)
            services.enter_context(storage)
            storage.record(services_file)
            _write_env(folder, storage.env, hardware)
            click.echo(f"{storage.endpoint}, data in {folder}/storage", err=True)
        with stages.stage("pack", "Packing OpenMoji into WebDataset shards"):
            _run(storage.env, "autopainter", "pack", "openmoji", manifest.rpartition("/")[0],
                 "--size", str(size * 3 // 2))  # fmt: skip
        with stages.stage("vgg", "Fetching VGG16 for the feature loss, and the networks that score"):
            _run(
                storage.env, "autopainter", "vgg", "--output", weights, "--metrics-weights", weights.rpartition("/")[0]
            )
        with stages.stage("train", "Training on a local Ray cluster"), RayCluster(
            num_cpus=max(Groups().usable_cores(), CPU_WORKERS), env=storage.env
        ) as ray:  # fmt: skip
            ray.record(services_file)
            click.echo(f"Ray dashboard: {ray.dashboard_url}", err=True)
            settings = [f"run.name={run}", f"data.manifest={manifest}", f"data.image_size={size}"]
            settings += [f"loss.vgg_weights={weights}", *(f"{field}={value}" for field, value in hardware.items())]
            settings += [f"train.steps={steps}"] if steps else []
            settings += ["telemetry.prometheus_host=127.0.0.1", f"telemetry.prometheus_port={free_ports(1)[0]}"]
            options = [option for setting in settings for option in ("--set", setting)]
            _run(storage.env | ray.env, "python", "job/train.py", "--config", str(CONFIG), *options)
        with stages.stage("paint", "Painting the held-out sketches"):
            sheet = folder / f"sheet-{size}.png"
            _run(storage.env, "autopainter", "evaluate", "--run", f"s3://autopainter/runs/{run}", "--sheet", str(sheet))
        click.echo(f"\nSeconds of each stage:\n{stages.table()}")
        click.echo(f"\nPainted pictures:  {sheet}")
        if keep_running:
            board = TensorBoard("s3://autopainter/runs", storage.env, detach=True)
            services.enter_context(board)
            board.record(services_file)
            click.echo(f"TensorBoard:       {board.url}")
            click.echo(f"Storage:           {storage.endpoint}; 'source {folder}/env' to use it from a shell")
            click.echo("Stop both:         bash scripts/quickstart.sh --stop")
        else:
            click.echo("TensorBoard:       bash scripts/quickstart.sh --keep-running")
        click.echo("Train further:     bash scripts/quickstart.sh --steps N   (continues from the last checkpoint)")


def _hardware_settings() -> dict[str, str]:
    """A worker for each GPU, else two on the CPU; bfloat16 where the hardware multiplies in it."""
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
        )
        if gpus := [(int(major), int(minor)) for major, minor in re.findall(r"(\d+)\.(\d+)", listed.stdout)]:
            workers = max(workers for workers in (1, 2, 4, 8) if workers <= len(gpus))
            precision = "bfloat16" if min(gpus) >= BFLOAT16_CAPABILITY else "float32"
            return {"cluster.workers": str(workers), "train.precision": precision}
    return {"cluster.workers": str(CPU_WORKERS), "train.precision": fast_precision()}


def _credentials(folder: Path) -> tuple[str, str]:
    """The key pair of this checkout's storage, made at random the first time."""
    path = folder / "credentials.json"
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            json.dump([secrets.token_hex(10), secrets.token_hex(20)], file)
    access_key, secret_key = json.loads(path.read_text())
    return access_key, secret_key


def _write_env(folder: Path, env: dict[str, str], settings: dict[str, str]) -> None:
    """What README's commands need to go on with this run: its storage, and the precision, say, that it began with."""
    ours = {f"AUTOPAINTER__{field.replace('.', '__').upper()}": value for field, value in settings.items()}
    with os.fdopen(os.open(folder / "env", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.writelines(f"export {name}={value}\n" for name, value in {**env, **ours}.items())


def _run(env: dict[str, str], program: str, *arguments: str) -> None:
    """Run a program of the virtual environment; its failure is the quickstart's. An interrupt lets it end first."""
    command = [str(Path(sys.executable).parent / program), *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=child_env(env)) as running:
        try:
            code = running.wait()
        except (KeyboardInterrupt, SystemExit):
            running.terminate()  # a terminal's Ctrl-C has reached it already; training now saves a checkpoint
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(STOP_SECONDS)
            running.kill()
            raise
    if code:
        click.echo(
            f"quickstart: '{program} {arguments[0]}' ended with exit code {code}; call again to continue", err=True
        )
        sys.exit(code)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--steps", type=click.IntRange(min=1), help="Training steps in all; more than before trains further.")
@click.option(
    "--size",
    type=click.IntRange(min=32, max=256),
    default=64,
    show_default=True,
    help="Edge of the images in pixels, a multiple of 32; each size is a run of its own.",
)
@click.option("--keep-running", is_flag=True, help="Leave storage and TensorBoard running at the end.")
@click.option("--stop", is_flag=True, help="Stop what --keep-running left running, and do nothing else.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=".quickstart",
    show_default=True,
    help="Where everything that it makes is kept.",
)
@click.option("--install-seconds", type=float, default=0, hidden=True)
def quickstart(
    steps: int | None, size: int, keep_running: bool, stop: bool, folder: Path, install_seconds: float
) -> None:
    """Train Auto-Painter on the OpenMoji set and paint held-out sketches, all on this machine.

    Run it again to continue a run that was interrupted, or with more --steps to train further.
    """
    if size % 32:
        raise click.BadParameter(
            f"{size} is not a multiple of 32; nearest: {round(size / 32) * 32}", param_hint="--size"
        )
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for kind in stop_recorded(folder / SERVICES):
        click.echo(f"stopped {kind}, left from an earlier call", err=True)
    if not stop:
        main_job(folder, size, steps, keep_running, Stages(install_seconds))


def _terminate(*_: object) -> None:
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    try:
        quickstart.main(standalone_mode=False)
    except click.ClickException as error:
        print(f"quickstart: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        print("\nquickstart: stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
