"""What the commands share: exit codes, options, logging."""

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from autopainter import logs
from autopainter.config import Config, load
from autopainter.errors import Diverged, Superseded, UserError, one_line

log = logging.getLogger(__name__)

_STEP_DIGITS = 18  # what no run takes, and Python reads without complaint


def exit_code_of(command: Callable[[], Any], program: str) -> int:
    """Run a click command: 0, or after one line on stderr 2 (the user must mend it), 1 (it failed), 130 (Ctrl-C)."""
    try:
        code = command()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        message, code = error.format_message(), 2
    except UserError as error:
        message, code = str(error), 2
    except (OSError, Diverged, Superseded) as error:  # storage, or this machine's own files: a full disk, say
        message, code = str(error), 1
    except (KeyboardInterrupt, click.Abort):
        message, code = "stopped; the same command continues", 130
    except Exception as error:
        memory = sys.modules.get("autopainter.memory")  # to import it now would take memory too
        if not isinstance(error, MemoryError) and not (memory and memory.ran_out(error)):
            raise
        message, code = f"too little memory: {one_line(error)}", 1
    line = f"{program}: {' '.join(message.split())}"
    if logs.structured():
        log.error(line)
    else:
        print(line, file=sys.stderr)
    return code


def options(*several: Callable[..., Any]) -> Callable[..., Any]:
    """One decorator of several options, which help shows in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(several):
            command = option(command)
        return command

    return decorate


@dataclass(frozen=True)
class Start:
    """What a command that trains was asked for.

    Attributes:
        config: the resolved configuration.
        dry_run: only print it.
        resume, overwrite: as ``autopainter.resume.claim`` takes them.
        log_format: as ``autopainter.logs.setup`` takes it.
    """

    config: Config
    dry_run: bool
    resume: Literal["auto", "none"]
    overwrite: bool
    log_format: logs.Format


_start_options = options(
    click.option("--config", "path", metavar="FILE", type=click.Path(dir_okay=False), required=True,
                 help="YAML file, such as job/configs/quickstart.yaml."),
    click.option("--set", "overrides", metavar="FIELD=VALUE", multiple=True,
                 help="Override a field, such as train.steps=100; may be given again."),
    click.option("--dry-run", is_flag=True, help="Print the resolved configuration and what would run, and stop."),
    click.option("--resume", type=click.Choice(["auto", "none"]), default="auto", show_default=True,
                 help="auto: continue the run if it exists; none: refuse to touch one that exists."),
    click.option("--overwrite", is_flag=True, help="With --resume none: delete the run that exists."),
    click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
                 help="json: an object a line, for machines that read the log."),
    click.option("--init-from", metavar="RUN[@STEP]",
                 help="Begin a new run with the weights of another one; short for --set train.init_from=..."),
)  # fmt: skip


def start_options(command: Callable[[Start], Any]) -> Callable[..., Any]:
    """The options of a command that trains; it is called with a ``Start``."""

    @_start_options
    @functools.wraps(command)
    def call(path: str, overrides: tuple[str, ...], init_from: str | None, **asked: Any) -> Any:
        changes = (*overrides, f"train.init_from={init_from}") if init_from else overrides
        return command(Start(load(path, changes), **asked))

    return call


def print_plan(config: Config, what: str) -> None:
    """What --dry-run prints."""
    click.echo(config.to_yaml(), nl=False)
    click.echo(f"# {what}")


class LocalPath(click.Path):
    """A path of this machine, as a ``Path``: a URI would become the name of a folder, ``s3:``."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; URIs and ``-`` are refused."""
        if "://" in str(value):
            self.fail(f"{value}: must be a path on this machine, not a URI", param, ctx)
        if value == "-":
            self.fail("-: must be a path; nothing is read from stdin or written to stdout", param, ctx)
        return super().convert(value, param, ctx)


def _step(context: click.Context, option: click.Parameter, value: str) -> int | str:
    if value in ("best", "latest"):
        return value
    if not value.isdecimal() or len(value) > _STEP_DIGITS:
        raise click.BadParameter(f"{value[:_STEP_DIGITS]!r} is no step; give the number of a saved one, best or latest")
    return int(value)


checkpoint_options = options(
    click.option("--run", "run_uri", required=True, metavar="RUN", help="Folder or s3:// URI of a run."),
    click.option(
        "--step",
        callback=_step,
        default="latest",
        show_default=True,
        metavar="N|best|latest",
        help="A saved step; best: the one with the highest validation score.",
    ),
)
"""Options of a command that uses a trained run: ``run_uri`` and ``step``, a ``paint.Step``."""
