"""Commands about a run's past: replay | journal."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from autopainter.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from autopainter.replay import Replay
    from autopainter.storage import Store


@click.command()
@click.argument("run_and_step", metavar="RUN@STEP")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to compute; a GPU if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def replay(run_and_step: str, device: str | None, as_json: bool) -> None:
    """Do one step of a run again and print its values, and the terms of each of its samples.

    RUN is its folder or s3:// URI; STEP counts from 1, as in TensorBoard. The newest checkpoint before the step is
    loaded, the steps after it are done in this process, and nothing is written into the run.
    """
    import torch

    from autopainter import replay as replaying
    from autopainter.progress import progress_bar

    uri, step = replaying.parse(run_and_step)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use cpu")
    gpu = torch.cuda.is_available() and device != "cpu"
    place = torch.device("cuda", 0) if gpu else torch.device("cpu")
    with progress_bar() as progress:
        found = replaying.replay(uri, step, place, progress)
    if as_json:
        click.echo(json.dumps(_plain(asdict(found)), allow_nan=False))
        return
    begun = f"the checkpoint of step {found.start}" if found.start else "the beginning"
    click.echo(f"{uri}@{step} from {begun}, on {place.type}, {found.microbatch} images at once"
               f" (the run: {found.workers} worker(s))\n")  # fmt: skip
    _print_scalars(found)
    click.echo("\nEach sample alone, with the weights before the step:\n")
    _print_samples(found)


def _plain(value: Any) -> Any:
    """As JSON can say it: a number that is none as text."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _print_scalars(found: "Replay") -> None:
    click.echo(f"{'':28}{'replayed':>14}{'in the run' if found.recorded else '':>14}".rstrip())
    for name, value in found.scalars.items():
        recorded = found.recorded.get(name) if found.recorded else None
        before = "" if recorded is None else f"{recorded:14.6g}"
        mark = "" if math.isfinite(value) else "  <-- not finite"
        click.echo(f"{name:28}{value:14.6g}{before}{mark}")


def _print_samples(found: "Replay") -> None:
    from autopainter.replay import COLUMNS, not_finite

    width = max(len("sample"), *(len(sample.key) for sample in found.samples))
    heads = [name.removeprefix("generator/") for name in COLUMNS]
    click.echo(f"{'sample':{width}}" + "".join(f"{head:>20}" for head in heads))
    guilty = 0
    for sample in found.samples:
        terms = [name.removeprefix("generator/") for name in not_finite(sample.terms)]
        guilty += bool(terms)
        mark = f"  <-- not finite: {', '.join(terms)}" if terms else ""
        click.echo(f"{sample.key:{width}}" + "".join(f"{sample.terms[name]:20.6g}" for name in COLUMNS) + mark)
    if guilty:
        click.echo(f"\n{guilty} of {len(found.samples)} samples: not finite")
    elif terms := not_finite(found.scalars):
        click.echo(f"\nNo sample alone is the reason: it is in the gradients, or in the step ({', '.join(terms)})")
    elif found.recorded and not_finite(found.recorded):
        click.echo("\nAll finite here: what stopped the run did not come again")


@click.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def journal(run_uri: str, as_json: bool) -> None:
    """Print the history of RUN, its folder or s3:// URI: each start and each thing that stopped it, oldest first."""
    from autopainter import checkpoint
    from autopainter.storage import open_store

    run = open_store(run_uri)
    events = _events(run)
    survey = checkpoint.survey(run)
    if not (events or survey.steps):
        raise UserError(f"{run_uri}: there is no run; RUN is STORAGE/NAME, a folder or an s3:// URI")
    step = max(survey.committed.keys() - survey.damaged.keys(), default=None)
    steps = None if step is None else survey.committed[step].meta["config"]["train"]["steps"]
    finished = step is not None and steps is not None and step >= steps
    if as_json:
        click.echo(json.dumps({"events": events, "newest_checkpoint": step, "steps": steps, "finished": finished}))
        return
    for event in events:
        click.echo(_line(event))
    if step is None:
        click.echo("no checkpoint: the run would begin at step 0")
    else:
        click.echo(f"newest checkpoint: step {step} of {steps}; the run is {'' if finished else 'not '}finished")
    if not finished and events and events[-1].get("workers"):
        click.echo(f"attempt {events[-1]['attempt']} has told of no end: it still runs, or its driver was killed")


def _events(run: "Store") -> list[dict[str, Any]]:
    """Attempts and entries of the journal by time."""
    from autopainter import checkpoint
    from autopainter import journal as journals

    events = [asdict(entry) for entry in journals.read(run)]
    for attempt in checkpoint.read_attempts(run):
        what = "begins" if attempt.workers is None else f"begins on {attempt.workers} worker(s)"
        if attempt.pulled_from:
            what = f"is a copy of a checkpoint of {attempt.pulled_from}"
        elif attempt.overwrites:
            what = "deletes the run that was here (--overwrite)"
        events.append(
            {"kind": "attempt", "text": f"attempt {attempt.number} {what}", "step": attempt.step,
             "time": attempt.started, "attempt": attempt.number, "workers": attempt.workers}
        )  # fmt: skip
    return sorted(events, key=lambda event: event["time"])


def _line(event: Mapping[str, Any]) -> str:
    when = datetime.fromtimestamp(event["time"]).astimezone().isoformat(timespec="seconds")
    step = "-" if event["step"] is None else event["step"]
    return f"{when}  {event['kind']:12}step {step:>8}  {event['text']}"
