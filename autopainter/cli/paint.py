"""The command that paints."""

from pathlib import Path
from typing import Any

import click

from autopainter.cli.common import LocalPath, checkpoint_options, print_plan
from autopainter.errors import UserError


@click.command()
@click.argument("sketches", nargs=-1, required=True, type=LocalPath(), metavar="SKETCH...")
@checkpoint_options
@click.option(
    "--hints",
    type=LocalPath(),
    metavar="PATH",
    help="PNG of the sketch's size, transparent but for strokes of colour; or a folder of such files, each"
    " named as its sketch.",
)
@click.option("--clean", is_flag=True, help="The sketches are photos or scans of paper: take light and shadows away.")
@click.option(
    "--size",
    type=click.IntRange(16, 8192),
    help="Resize sketch and hints so that the longer edge has this many pixels.",
)
@click.option(
    "--tile/--no-tile",
    "tiled",
    default=None,
    help="Paint in blended tiles of the trained size, or at once; default: large pictures in tiles.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=LocalPath(),
    metavar="PATH",
    help="PNG file for one sketch; a folder for several.",
)
@click.option("--dry-run", is_flag=True, help="Print the run's configuration and what would be painted, and stop.")
def paint(
    sketches: tuple[Path, ...],
    run_uri: str,
    step: Any,
    hints: Path | None,
    output: Path,
    dry_run: bool,
    **manner: Any,
) -> int:
    """Paint sketches with a trained run.

    SKETCH is a picture of any size, or a folder of pictures. The exit code is 1 if only some of several sketches could
    be painted.
    """
    from autopainter.paint import Painter
    from autopainter.sketches import Manner, paint_file, plan

    jobs = plan(sketches, hints, output)
    painter = Painter.load(run_uri, step)
    if dry_run:
        print_plan(painter.config, f"paints {len(jobs)} sketch(es) into {output} with step {painter.step}")
        return 0
    unpainted = 0
    for job in jobs:
        try:
            paint_file(painter, job, Manner(**manner))
        except UserError as error:
            if len(jobs) == 1:
                raise
            click.echo(f"not painted: {error}", err=True)
            unpainted += 1
        else:
            click.echo(job.target)
    return min(unpainted, 1)
