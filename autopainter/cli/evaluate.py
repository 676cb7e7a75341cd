"""The command that scores a run."""

import json
from dataclasses import asdict
from pathlib import Path

import click


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
