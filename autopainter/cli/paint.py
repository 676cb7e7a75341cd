"""The command that paints."""

from pathlib import Path

import click

from autopainter.cli.common import print_plan


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
