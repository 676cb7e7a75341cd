"""The command line: autopainter pack | index | inspect | vgg | train | fields | paint | evaluate | export | serve
| checkpoints | replay | journal | metrics | doctor."""

import sys

import click

from autopainter import __version__
from autopainter.cli import checkpoints, data, doctor, evaluate, export, metrics, model, paint, run, serve
from autopainter.cli.common import Start, exit_code_of, print_plan, start_options

__all__ = ["Start", "cli", "exit_code_of", "main", "print_plan", "start_options"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Turn line sketches into coloured cartoons: prepare data, train, paint."""


for command in (
    data.pack, data.index, data.inspect, model.vgg, model.train, model.list_fields, paint.paint, evaluate.evaluate,
    export.export, serve.serve,
    checkpoints.checkpoints, run.replay, run.journal,
    metrics.metrics, doctor.doctor,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Run the command of ``sys.argv`` and exit."""
    sys.exit(exit_code_of(lambda: cli.main(standalone_mode=False), "autopainter"))
