"""Commands about data sets: pack | index | inspect."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import yaml

from autopainter.cli.common import LocalPath, options
from autopainter.errors import UserError


@click.group()
def pack() -> None:
    """Pack pictures into WebDataset shards with a manifest, on a folder or s3://; run again to continue."""


pack_options = options(
    click.option("--size", type=int, default=512, show_default=True, help="Edge of the squares in pixels."),
    click.option("--validation", type=float, default=0.05, show_default=True, help="Share that is held out."),
    click.option("--group-by", metavar="REGEX", help="Inputs whose names have the same match (of the first group, if"
                 " there is one) stay on one side of the split."),
    click.option("--shard-samples", type=int, default=512, show_default=True, help="Inputs of a shard."),
    click.option("--jpeg-quality", type=int, default=95, show_default=True, help="Of the stored pictures."),
    click.option("--limit", type=int, help="Pack only so many inputs."),
    click.option("--max-bad", type=click.IntRange(min=0), default=0, show_default=True,
                 help="Inputs that may be broken or undecided before the exit code is 1."),
    click.option("--workers", type=click.IntRange(min=1), help="Processes; one for each usable core if not given."),
    click.option("--overwrite", is_flag=True, help="Replace a data set that is there."),
    click.option("--dry-run", is_flag=True, help="Print what would be packed, and stop."),
)  # fmt: skip

fit_option = click.option(
    "--fit",
    type=click.Choice(["crop", "upper-lower", "resize", "pad"]),
    default="crop",
    show_default=True,
    help="How a picture becomes square: its centre; of a portrait the upper and the lower square, as two samples;"
    " resized, which distorts; padded with white.",
)


@pack.command()
@click.argument("destination")
@pack_options
def openmoji(destination: str, size: int, **choices: Any) -> None:
    """Pack the OpenMoji set: 4,495 drawings by artists, with their line art, into DESTINATION."""
    from autopainter.data.sources import OpenMoji

    _pack(OpenMoji(size), destination, **choices)


@pack.command()
@click.argument("pictures")
@click.argument("destination")
@fit_option
@click.option(
    "--sketch",
    type=click.Choice(["stored", "on-the-fly"]),
    default="stored",
    show_default=True,
    help="Store the drawings, or let the training job make new ones at each step (sketch.mode=on_the_fly).",
)
@click.option(
    "--xdog",
    multiple=True,
    metavar="NAME=VALUE",
    help="Parameter of the drawings, such as sigma=1.0 or phi=0.2; may be given again.",
)
@click.option(
    "--jitter",
    type=float,
    default=0.0,
    show_default=True,
    help="How far the parameters vary from picture to picture, 0 to 1.",
)
@pack_options
def images(
    pictures: str,
    destination: str,
    size: int,
    fit: Any,
    sketch: str,
    xdog: tuple[str, ...],
    jitter: float,
    **choices: Any,
) -> None:
    """Pack colour PICTURES (folder or s3:// prefix), with sketches drawn by XDoG, into DESTINATION."""
    from autopainter.data.sources import ColorImages

    mode: Any = sketch.replace("-", "_")
    _pack(ColorImages(pictures, size, fit, _xdog(xdog), jitter, mode), destination, **choices)


def _xdog(settings: tuple[str, ...]) -> Any:
    from autopainter.data.sketch import AUTHORS

    changes = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in asdict(AUTHORS):
            raise UserError(f"xdog: {name!r} is no parameter; there are {', '.join(asdict(AUTHORS))}")
        try:
            changes[name] = float(value)
        except ValueError:
            raise UserError(f"xdog.{name}: must be a number, got {value!r}") from None
    return replace(AUTHORS, **changes)


@pack.command()
@click.argument("pictures")
@click.argument("destination")
@click.option(
    "--sketch-side",
    type=click.Choice(["left", "right", "auto"]),
    required=True,
    help="Half that holds the drawing; auto decides for each picture, and names those that it cannot decide.",
)
@fit_option
@pack_options
def side_by_side(pictures: str, destination: str, sketch_side: Any, size: int, fit: Any, **choices: Any) -> None:
    """Pack PICTURES whose halves are a colour picture and its drawing into DESTINATION."""
    from autopainter.data.sources import SideBySide

    _pack(SideBySide(pictures, size, sketch_side, fit), destination, **choices)


@pack.command()
@click.argument("colors")
@click.argument("sketches")
@click.argument("destination")
@fit_option
@pack_options
def folders(colors: str, sketches: str, destination: str, size: int, fit: Any, **choices: Any) -> None:
    """Pack the pictures of COLORS with the drawings of the same names in SKETCHES into DESTINATION."""
    from autopainter.data.sources import MatchedFolders

    _pack(MatchedFolders(colors, sketches, size, fit), destination, **choices)


def _pack(
    source: Any, destination: str, overwrite: bool, workers: int | None, dry_run: bool, max_bad: int, **choices: Any
) -> None:
    from autopainter.data import groups
    from autopainter.data.pack import PackOptions, pack
    from autopainter.data.shard import plan_shards, printable
    from autopainter.progress import progress_bar

    if dry_run:
        packing = PackOptions(**choices)
        plans = plan_shards(groups.by_pattern(source.listing().items, packing.group_by), packing)
        click.echo(yaml.safe_dump({"source": source.info(), "options": choices}, sort_keys=False), nl=False)
        inputs = sum(len(plan.items) for plan in plans)
        click.echo(f"# packs {inputs} inputs into {len(plans)} shards in {printable(destination)}")
        return
    run = click.get_current_context().obj  # job/pack.py runs the tasks on a cluster
    with progress_bar() as progress:
        result = pack(source, destination, PackOptions(**choices), workers=workers, run=run, overwrite=overwrite,
                      progress=progress)  # fmt: skip
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in result.bad.items())
    for kind, found in result.bad.items():
        for name, reason in found.items():
            click.echo(f"{kind}: {name}: {reason}", err=True)
    already = "already packed: " if result.already_packed else ""
    samples = ", ".join(f"{count} {split}" for split, count in result.samples.items())
    ignored = ", ".join(f"{count} {suffix}" for suffix, count in result.ignored.items())
    click.echo(
        f"{printable(result.uri)}: {already}{samples} samples in {result.shards} shards, {result.bytes / 1e6:.1f} MB;"
        f" {counts}, {len(result.left_out['excluded'])} left out by design,"
        f" {len({name for twins in result.duplicates for name in twins})} share a file"
        + (f"; no pictures: {ignored}" if ignored else "")
    )
    _exit_if_bad(sum(len(found) for found in result.bad.values()), max_bad)


def _exit_if_bad(bad: int, allowed: int) -> None:
    if bad > allowed:
        click.echo(f"{bad} inputs are bad and --max-bad allows {allowed}; the others are in the data set", err=True)
        sys.exit(1)


@click.command()
@click.argument("shards")
@click.option("--color", required=True, metavar="SUFFIX", help="Members that are the pictures, such as png or rgb.jpg.")
@click.option("--sketch", metavar="SUFFIX", help="Members that are the drawings; without it they are made on the fly.")
@click.option("-o", "--output", metavar="FILE", help="Manifest to write, if not manifest.json beside the shards.")
@click.option("--validation", type=float, default=0.05, show_default=True, help="Share that is held out.")
@click.option("--validation-shards", metavar="PATTERN", help="Hold out the shards of these names instead: 'val-*.tar'.")
@click.option("--group-by", metavar="REGEX", help="Samples whose keys have the same match stay on one side.")
@click.option(
    "--max-bad",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Samples that may be broken before the exit code is 1.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes; one for each usable core if not given.")
@click.option("--overwrite", is_flag=True, help="Replace a manifest that is there.")
def index(shards: str, color: str, sketch: str | None, max_bad: int, **choices: Any) -> None:
    """Make WebDataset SHARDS of others (folder or s3:// prefix of .tar files) a data set, without rewriting them."""
    from autopainter.data.index import Members
    from autopainter.data.index import index as make
    from autopainter.data.shard import printable
    from autopainter.progress import progress_bar

    members = Members(color.lower().lstrip("."), sketch.lower().lstrip(".") if sketch else None)
    with progress_bar() as progress:
        result = make(shards, members, progress=lambda done, total: progress("indexing", done, total), **choices)
    for name, reason in result.broken.items():
        click.echo(f"broken: {name}: {reason}", err=True)
    samples = ", ".join(f"{count} {split}" for split, count in result.samples.items())
    click.echo(
        f"{printable(result.uri)}: {samples} samples in {result.shards} shards, {result.bytes / 1e6:.1f} MB;"
        f" {len(result.broken)} broken"
    )
    _exit_if_bad(len(result.broken), max_bad)


@click.command()
@click.argument("dataset")
@click.option("--verify", is_flag=True, help="Read everything and check every checksum.")
@click.option("--sheet", type=LocalPath(), metavar="PNG", help="Write a contact sheet of some samples.")
@click.option("--split", default="train", show_default=True, help="Split of the sheet.")
@click.option("--samples", type=click.IntRange(min=1), default=24, show_default=True, help="Samples in the sheet.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of YAML.")
def inspect(dataset: str, verify: bool, sheet: Path | None, split: str, samples: int, as_json: bool) -> None:
    """Show what is in a DATASET: its folder, its s3:// prefix or its manifest."""
    from autopainter import outputs
    from autopainter.data import inspect as inspection
    from autopainter.data import manifest as manifests
    from autopainter.data import pictures
    from autopainter.progress import progress_bar

    if sheet:
        outputs.check_png(sheet, "--sheet")
    manifest = manifests.load(dataset if dataset.endswith(".json") else f"{dataset.rstrip('/')}/manifest.json")
    about = inspection.describe(manifest)
    shown = inspection.sheet(manifest, split, samples) if sheet else None
    if verify:
        with progress_bar() as progress:
            faults = inspection.verify(manifest, lambda done, total: progress("verifying", done, total))
        about["verified"] = not faults
        for name, fault in faults.items():
            click.echo(f"damaged: {name}: {fault}", err=True)
    click.echo(json.dumps(about) if as_json else yaml.safe_dump(about, sort_keys=False).rstrip())
    if sheet and shown is not None:
        pictures.write_png(sheet, shown)
    if verify and faults:
        sys.exit(1)
