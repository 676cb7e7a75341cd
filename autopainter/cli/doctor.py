"""The command doctor."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autopainter.config import load

if TYPE_CHECKING:  # it imports boto3 and the data code, which --help does not need
    from autopainter.doctor.findings import Finding

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


@click.command()
@click.option(
    "--config",
    "path",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="YAML file: also check run storage, data set, weights and workers of this configuration.",
)
@click.option(
    "--set", "overrides", metavar="FIELD=VALUE", multiple=True, help="Override a field of it; may be given again."
)
@click.option(
    "--storage",
    "storages",
    metavar="URI",
    multiple=True,
    help="Also check this folder or s3:// URI as a place for runs; may be given again.",
)
@click.option(
    "--ray",
    "ray",
    metavar="ADDRESS",
    envvar="RAY_ADDRESS",
    help="Also check this Ray cluster: http://HOST:8265 or HOST:6379; RAY_ADDRESS if not given.",
)
@click.option(
    "--timeout",
    "seconds",
    type=click.FloatRange(min=0.1),
    default=15.0,
    show_default=True,
    help="Longest time in seconds of a check that waits for a storage or a cluster.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor(
    path: str | None, overrides: tuple[str, ...], storages: tuple[str, ...], ray: str | None, seconds: float,
    as_json: bool,
) -> int:  # fmt: skip
    """Check this machine, and what is named, before time is spent on them; the exit code is 1 if something would fail.

    Without options it looks at the machine alone: programs, GPUs, memory, folders, clock.
    """
    from autopainter.doctor import checks, cluster
    from autopainter.storage import open_store

    config = load(path, overrides) if path is not None or overrides else None
    for uri in storages:
        open_store(uri)  # raises if it is none
    address = cluster.parse(ray) if ray else None
    with _quiet_storage():
        findings = checks.examine(config, storages, address, seconds)
        if as_json:
            found = list(findings)
            click.echo(json.dumps({"failed": _count(found, "failed"), "warnings": _count(found, "warning"),
                                   "checks": [asdict(finding) for finding in found]}))  # fmt: skip
        elif (console := Console()).is_terminal:
            found = _print_table(console, findings)
        else:
            found = list(_print_lines(findings))
    return 1 if _count(found, "failed") else 0


def _count(found: Sequence["Finding"], result: str) -> int:
    return sum(finding.result == result for finding in found)


def _word(finding: "Finding") -> str:
    return "FAILED" if finding.result == "failed" else finding.result


def _sum(found: Sequence["Finding"]) -> str:
    counts = {"FAILED": "failed", "warnings": "warning", "skipped": "skipped", "ok": "ok"}
    return ", ".join(f"{_count(found, result)} {word}" for word, result in counts.items())


def _print_lines(findings: Iterator["Finding"]) -> Iterator["Finding"]:
    """Print each finding as soon as it is there."""
    found = []
    for finding in findings:
        click.echo(f"{_word(finding):8} {finding.check:30} {finding.detail}")
        if finding.advice:
            click.echo(f"{'':8} {'':30} -> {finding.advice}")
        found.append(finding)
        yield finding
    click.echo(_sum(found))


def _print_table(console: Console, findings: Iterator["Finding"]) -> list["Finding"]:
    found = []
    with console.status("checking the machine") as status:
        for finding in findings:
            found.append(finding)
            status.update(f"checked: {finding.check}")
    table = Table("check", "result", "detail", "what to do")
    for finding in found:
        result = Text(_word(finding), _STYLES[finding.result])
        table.add_row(Text(finding.check), result, Text(finding.detail, overflow="fold"), Text(finding.advice))
    console.print(table)
    console.print(_sum(found), highlight=False)
    return found


@contextlib.contextmanager
def _quiet_storage() -> Iterator[None]:
    """Attempts that are made again are no news here: the last one's error is in the report."""
    storage = logging.getLogger("autopainter.storage")
    level = storage.level
    storage.setLevel(logging.ERROR)
    try:
        yield
    finally:
        storage.setLevel(level)
