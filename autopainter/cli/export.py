"""The command that exports."""

from typing import Any

import click

from autopainter.cli.common import checkpoint_options


@click.command()
@checkpoint_options
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "torch-export"]),
    required=True,
    help="onnx: a model for ONNX runtimes; torch-export: a program for torch.export.load.",
)
@click.option("-o", "--output", required=True, metavar="FILE", help="Path or s3:// URI of the file; must not exist.")
def export(run_uri: str, step: Any, kind: Any, output: str) -> int:
    """Write the painter of a run as one file for other programs.

    The file takes pixels of any size and gives the painted picture. It is loaded again and compared with the run
    before it is written; the exit code is 1, and there is no file, if it paints something else.
    """
    from autopainter import export as exporting

    try:
        done = exporting.export(run_uri, step, kind, output)
    except exporting.Mismatch as error:
        click.echo(f"autopainter: {error}", err=True)
        return 1
    click.echo(
        f"{output}: step {done.step}, {kind}, {done.bytes / 1e6:.1f} MB;"
        f" max abs difference {done.difference:.1e}, at most {exporting.TOLERANCE:g} allowed"
    )
    return 0
