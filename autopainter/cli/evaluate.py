"""The command that scores a run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autopainter.cli.common import LocalPath, checkpoint_options

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from autopainter.evaluate.run import Evaluation


@click.command()
@checkpoint_options
@click.option(
    "--metrics-weights",
    "weights",
    metavar="FOLDER",
    help="Folder or s3:// prefix that 'autopainter vgg --metrics-weights' filled, for LPIPS and FD-VGG; that"
    " of the run's loss.vgg_weights if not given.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Score the first so many images only.")
@click.option("--sheet", type=LocalPath(), metavar="PNG", help="Write a contact sheet of some samples.")
@click.option("--samples", type=click.IntRange(min=1), default=24, show_default=True, help="Samples in the sheet.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(
    run_uri: str,
    step: Any,
    weights: str | None,
    limit: int | None,
    sheet: Path | None,
    samples: int,
    as_json: bool,
) -> None:
    """Score a run on its validation split, with and without hints, beside what no network would score.

    PSNR, SSIM, LPIPS, FD-VGG and the colour error inside the hints; docs/evaluation.md says what each is.
    """
    from autopainter import outputs
    from autopainter.data import pictures
    from autopainter.evaluate.run import evaluate_run
    from autopainter.progress import progress_bar

    if sheet:
        outputs.check_png(sheet, "--sheet")
    with progress_bar() as progress:
        found = evaluate_run(
            run_uri, step, weights=weights, limit=limit, samples=samples if sheet else 0, progress=progress
        )
    if as_json:
        click.echo(json.dumps(_document(found), allow_nan=False))
    else:
        _print(found)
    if sheet and found.sheet is not None:
        pictures.write_png(sheet, found.sheet)


def _document(found: "Evaluation") -> dict[str, Any]:
    from autopainter.evaluate.metrics import COLUMNS

    document = asdict(found)
    del document["sheet"]
    return document | {"units": {name: column.unit for name, column in COLUMNS.items()}}


def _print(found: "Evaluation") -> None:
    from autopainter.evaluate.metrics import COLUMNS

    columns = {name: column for name, column in COLUMNS.items() if name not in found.absent}
    click.echo(f"{'':18}" + "".join(f"{column.title:>12}" for column in columns.values()))
    for row, values in found.scores.items():
        cells = (f"{values[name]:12.{column.digits}f}" for name, column in columns.items())
        click.echo(f"{row:18}" + "".join(cells))
    click.echo(f"\n{found.images} images of {found.image_size}x{found.image_size} of the validation split of"
               f" {found.manifest}, step {found.step}; errors in [0, 255]")  # fmt: skip
    if "fd_vgg" in columns:
        click.echo(f"FD-VGG is biased upwards for few images: compare only what was scored on these {found.images}")
    for reason in dict.fromkeys(found.absent.values()):
        titles = [COLUMNS[name].title for name, why in found.absent.items() if why == reason]
        click.echo(f"no {', '.join(titles)}: {reason}")
