"""Commands about the checkpoints of a run: list | verify | pull | prune."""

import contextlib
import json
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from autopainter.errors import CorruptData, UserError

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from autopainter.checkpoint import Checkpoint, Pruning, Survey
    from autopainter.storage import Store


@click.group()
def checkpoints() -> None:
    """List, verify, copy and delete the checkpoints of a RUN: its folder or s3:// URI, STORAGE/NAME."""


@checkpoints.command(name="list")
@click.argument("run_uri", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_checkpoints(run_uri: str, as_json: bool) -> None:
    """List the checkpoints of RUN: commits and sizes are looked at, the bytes are not read ('verify' reads them)."""
    from autopainter import checkpoint

    run, _ = _open(run_uri)
    found = checkpoint.survey(run)
    rows = [_row(found, step) for step in found.steps]
    if as_json:
        click.echo(json.dumps(rows))
        return
    click.echo(f"{'step':>10}{'attempt':>9}  {'written':26}{'MB':>10}{'score':>9}")
    for row in rows:
        if row["attempt"] is None:
            click.echo(f"{row['step']:10}{'DAMAGED: ':>11}{row['damaged']}")
            continue
        marks = [f"DAMAGED: {row['damaged']}"] if row["damaged"] else row["marks"]
        score = "-" if row["score"] is None else f"{row['score']:.2f}"
        line = f"{row['step']:10}{row['attempt']:9}  {row['written'] or '-':26}{row['bytes'] / 1e6:10.1f}{score:>9}"
        click.echo(f"{line}  {', '.join(marks)}".rstrip())


def _row(found: "Survey", step: int) -> dict[str, Any]:
    from autopainter import checkpoint

    saved = found.committed.get(step)
    good = {step: saved for step, saved in found.committed.items() if step not in found.damaged}
    steps = {"newest": max(good, default=None), "best": next(iter(checkpoint.by_score(good)), None)}
    return {
        "step": step,
        "attempt": saved.attempt if saved else None,
        "written": _local_time(saved.written) if saved and saved.written else None,
        "bytes": saved.bytes if saved else None,
        "score": saved.score if saved else None,
        "marks": [mark for mark, of in steps.items() if of == step],
        "damaged": found.damaged.get(step),
    }


def _local_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


@checkpoints.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--step", type=int, help="A saved step; all if not given.")
def verify(run_uri: str, step: int | None) -> None:
    """Read the checkpoints of RUN and check every checksum; the exit code is 1 if one is damaged."""
    from autopainter import checkpoint

    run, steps = _open(run_uri, step)
    damaged = False
    for candidate in steps:
        try:
            checkpoint.verify(run, candidate)
            click.echo(f"step {candidate}: good")
        except CorruptData as error:
            if checkpoint.is_gone(run, candidate):
                click.echo(f"step {candidate}: deleted meanwhile")
                continue
            damaged = True
            click.echo(f"step {candidate}: DAMAGED: {error}")
    if damaged:
        sys.exit(1)


@checkpoints.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--step", type=int, help="A saved step; the newest good one if not given.")
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Where to: becomes a run that can be painted"
              " with and continued.")  # fmt: skip
def pull(run_uri: str, step: int | None, output: str) -> None:
    """Copy one checkpoint of RUN, verified, into a folder; the same command again continues."""
    from autopainter import checkpoint
    from autopainter.storage import open_store

    folder = open_store(output)
    damaged: set[int] = set()
    run, steps = _open(run_uri, step)
    while True:
        candidate = steps[-1]
        try:
            saved = _pull(run, candidate, folder)
            break
        except CorruptData as error:
            if not checkpoint.is_gone(run, candidate):  # else a live run has saved a newer one and deleted this one
                damaged.add(candidate)
            steps = [other for other in _open(run_uri, step)[1] if other not in damaged]
            if not steps:
                raise
            if candidate in damaged:
                click.echo(f"step {candidate}: DAMAGED, the one before is tried: {error}", err=True)
    click.echo(f"{output}: step {saved.step}, {saved.bytes / 1e6:.1f} MB, sha256 verified")


def _pull(run: "Store", step: int, folder: "Store") -> "Checkpoint":
    """Copy a checkpoint file by file, its commit last.

    Raises:
        CorruptData: it is damaged; nothing of it is left in the folder.
        UserError: the folder holds another checkpoint of this step.
    """
    from autopainter.checkpoint import files, latest_attempt

    saved = files.read(run, step)
    if odd := [entry["key"] for name, entry in saved.files.items()
               if entry["key"] != files.file_key(step, saved.attempt, name) or "/" in name]:  # fmt: skip
        raise CorruptData(f"{run.locate(files.commit_key(step))}: names a file outside its checkpoint: {odd[0]!r}")
    if there := _holds(folder, saved):
        with contextlib.suppress(CorruptData):  # a damaged copy is mended below
            return files.verify(folder, step)
    for entry in saved.files.values():
        try:
            folder.write(entry["key"], files.read_file(run, entry))
        except CorruptData:
            if not there:
                folder.delete(entry["key"] for entry in saved.files.values())
            raise
    if latest_attempt(folder) < saved.attempt:
        # Who continues there takes a higher number than that of these files, and so deletes them when they are old.
        record = {"attempt": saved.attempt, "pulled_from": run.uri, "started": time.time()}
        folder.write(f"attempts/{saved.attempt:06d}.json", json.dumps(record).encode())
    if not folder.create(files.commit_key(step), files.encode(saved)):
        _holds(folder, saved)
    return saved


def _holds(folder: "Store", saved: "Checkpoint") -> bool:
    """Whether a folder has the commit of this checkpoint; ``UserError`` if it has another one of the same step."""
    from autopainter.checkpoint import files

    if folder.size(files.commit_key(saved.step)) is None:
        return False
    try:
        there = files.read(folder, saved.step)
    except CorruptData as error:
        raise UserError(f"--output: {error}; delete it or choose another folder") from None
    if there != saved:
        place = folder.locate(files.commit_key(saved.step))
        raise UserError(f"--output: {place}: another checkpoint of step {saved.step}; choose another folder")
    return True


@checkpoints.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--keep", type=click.IntRange(min=1), help="Newest checkpoints that are kept; as the run itself if not"
              " given.")  # fmt: skip
@click.option("--keep-best", type=click.IntRange(min=0), help="Checkpoints with the highest scores that are kept beside"
              " them; as the run itself if not given.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be deleted, and stop.")
def prune(run_uri: str, keep: int | None, keep_best: int | None, dry_run: bool) -> None:
    """Delete old checkpoints of RUN, and what killed attempts left behind; the run may be training meanwhile."""
    from autopainter import checkpoint

    run, _ = _open(run_uri)
    found = checkpoint.survey(run)
    if found.committed and (keep is None or keep_best is None):
        own = _configured(run, found.committed[max(found.committed)])
        keep, keep_best = own[0] if keep is None else keep, own[1] if keep_best is None else keep_best
    plan = checkpoint.Retention(keep or 1, keep_best or 0).pruning(run)
    uploads = plan.uploads(run, dry_run)
    if not dry_run:
        plan.delete(run)
    _print(plan, uploads, "would be deleted" if dry_run else "deleted")


def _configured(run: "Store", saved: "Checkpoint") -> tuple[int, int]:
    """How many newest and best checkpoints the run itself keeps."""
    from autopainter.config import restore

    own = restore(saved.meta["config"], f"{run.uri}, step {saved.step}").checkpoint
    return own.keep, own.keep_best


def _print(plan: "Pruning", uploads: list[str], deleted: str) -> None:
    from autopainter.checkpoint import files

    sizes = {entry.key: entry.bytes for entry in plan.unwanted}
    for step in plan.found.steps:
        if files.commit_key(step) not in sizes:
            continue
        of_step = sum(sizes.pop(key, 0) for key in plan.found.keys([step]))
        damaged = f"; damaged: {plan.found.damaged[step]}" if step in plan.found.damaged else ""
        click.echo(f"step {step}: {deleted}, {of_step / 1e6:.1f} MB{damaged}")
    if sizes:
        click.echo(f"{len(sizes)} files without a commit: {deleted}, {sum(sizes.values()) / 1e6:.1f} MB")
    if uploads:
        click.echo(f"{len(uploads)} unfinished uploads: {deleted}")
    for step in plan.spared:
        why = "which may pass" if step in plan.found.unreadable else "but the run may be replacing it"
        click.echo(f"step {step}: DAMAGED, {why}; left alone: {plan.found.damaged[step]}")
    freed = sum(entry.bytes for entry in plan.unwanted)
    click.echo(f"kept: {_joined(plan.kept)}; {deleted}: {freed / 1e6:.1f} MB")


def _joined(steps: Iterable[int]) -> str:
    return ", ".join(f"step {step}" for step in steps)


def _open(run_uri: str, step: int | None = None) -> "tuple[Store, list[int]]":
    """A run and the steps that it has saved, or the one of them that was asked for.

    Raises:
        UserError: it has no such checkpoint.
    """
    from autopainter import checkpoint
    from autopainter.storage import open_store

    run = open_store(run_uri)
    saved = checkpoint.steps(run)
    if not saved:
        raise UserError(f"{run_uri}: there is no checkpoint; is this STORAGE/NAME of a run that has saved one?")
    if step is not None and step not in saved:
        raise UserError(f"{run_uri}: there is no checkpoint of step {step}; saved steps: {saved}")
    return run, saved if step is None else [step]
