"""The main job on this machine, with every part real: storage, packing, Ray, training, painting.

Everything it makes is in .quickstart/; it leaves no process behind unless --keep-running is given.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
from services import RayCluster, SeaweedFS, TensorBoard, child_env, stop_recorded

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".quickstart"
SERVICES = FOLDER / "services.jsonl"
CONFIG = Path("job/configs/quickstart.yaml")
WORKERS = 2


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


def main_job(size: int, steps: int | None, keep_running: bool, stages: Stages) -> None:
    """Storage, data, weights, training and painting; every step of it may have been done before."""
    run, manifest = f"quickstart-{size}", f"s3://datasets/openmoji-{size * 3 // 2}/manifest.json"
    weights = "s3://datasets/weights/vgg16-relu2_2.safetensors"
    with contextlib.ExitStack() as services:
        with stages.stage("storage", "Starting object storage (SeaweedFS) on loopback"):
            storage = SeaweedFS(FOLDER / "storage", **_credentials(), detach=keep_running)
            services.enter_context(storage)
            storage.record(SERVICES)
            _write_env(storage.env)
            click.echo(f"{storage.endpoint}, data in {FOLDER.name}/storage", err=True)
        with stages.stage("pack", "Packing OpenMoji into WebDataset shards"):
            _run(storage.env, "autopainter", "pack", "openmoji", manifest.rpartition("/")[0],
                 "--size", str(size * 3 // 2))  # fmt: skip
        with stages.stage("vgg", "Fetching the VGG16 layers of the feature loss"):
            _run(storage.env, "autopainter", "vgg", "--output", weights)
        with stages.stage("train", f"Training on a local Ray cluster, {WORKERS} workers"), RayCluster(
            num_cpus=max(os.cpu_count() or 1, WORKERS), dashboard=False, env=storage.env
        ) as ray:  # fmt: skip
            ray.record(SERVICES)
            settings = [f"run.name={run}", f"data.manifest={manifest}", f"data.image_size={size}"]
            settings += [f"loss.vgg_weights={weights}"] + ([f"train.steps={steps}"] if steps else [])
            options = [option for setting in settings for option in ("--set", setting)]
            _run(storage.env | ray.env, "python", "job/train.py", "--config", str(CONFIG), *options)
        with stages.stage("paint", "Painting the held-out sketches"):
            sheet = FOLDER / f"sheet-{size}.png"
            _run(storage.env, "autopainter", "evaluate", "--run", f"s3://runs/{run}", "--sheet", str(sheet))
        click.echo(f"\nSeconds of each stage:\n{stages.table()}")
        click.echo(f"\nPainted pictures:  {sheet}")
        if keep_running:
            board = TensorBoard(f"s3://runs/{run}/events", storage.env, detach=True)
            services.enter_context(board)
            board.record(SERVICES)
            click.echo(f"TensorBoard:       {board.url}")
            click.echo(f"Storage:           {storage.endpoint}; 'source {FOLDER.name}/env' to use it from a shell")
            click.echo("Stop both:         bash scripts/quickstart.sh --stop")
        else:
            click.echo("TensorBoard:       bash scripts/quickstart.sh --keep-running")
        click.echo("Train further:     bash scripts/quickstart.sh --steps N   (continues from the last checkpoint)")


def _credentials() -> dict[str, str]:
    """The key pair of this checkout's storage, made at random the first time."""
    path = FOLDER / "credentials.json"
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            json.dump({"access_key": secrets.token_hex(10), "secret_key": secrets.token_hex(20)}, file)
    pair: dict[str, str] = json.loads(path.read_text())
    return pair


def _write_env(env: dict[str, str]) -> None:
    with os.fdopen(os.open(FOLDER / "env", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.writelines(f"export {name}={value}\n" for name, value in env.items())


def _run(env: dict[str, str], program: str, *arguments: str) -> None:
    """Run a program of the virtual environment; its failure is the quickstart's."""
    command = [str(Path(sys.executable).parent / program), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=child_env(env))
    if done.returncode:
        click.echo(f"quickstart: '{program} {arguments[0]}' ended with exit code {done.returncode}", err=True)
        sys.exit(done.returncode)


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
@click.option("--install-seconds", type=float, default=0, hidden=True)
def quickstart(steps: int | None, size: int, keep_running: bool, stop: bool, install_seconds: float) -> None:
    """Train Auto-Painter on the OpenMoji set and paint held-out sketches, all on this machine.

    Run it again to continue a run that was interrupted, or with more --steps to train further.
    """
    if size % 32:
        raise click.BadParameter(
            f"{size} is not a multiple of 32; nearest: {round(size / 32) * 32}", param_hint="--size"
        )
    FOLDER.mkdir(exist_ok=True)
    for kind in stop_recorded(SERVICES):
        click.echo(f"stopped {kind}, left from an earlier call", err=True)
    if not stop:
        main_job(size, steps, keep_running, Stages(install_seconds))


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
