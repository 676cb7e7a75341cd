"""What must hold of a run when ``chaos.py`` is done with it."""

import contextlib
import os
from pathlib import Path

import torch
from chaos_watch import Failed
from services import SeaweedFS

from autopainter import checkpoint, storage

MARK = "AUTOPAINTER_CHAOS"
"""Environment variable that all processes of one call of this script inherit."""


def check(run_uri: str, reference_uri: str, steps: int, server: SeaweedFS, folder: Path) -> None:
    """Compare a run with its reference and look through its storage; ``Failed`` if something does not hold.

    Args:
        steps: that both must have done.
        folder: for copies of their events.
    """
    run, reference = storage.open_store(run_uri), storage.open_store(reference_uri)
    mine, other = final_state(run, steps), final_state(reference, steps)
    differing = sorted(mine.keys() ^ other.keys())
    differing += [name for name in sorted(mine.keys() & other.keys()) if bits(mine[name]) != bits(other[name])]
    if differing:
        raise Failed(f"{len(differing)} of {len(other)} tensors differ from the undisturbed run's: {differing[:3]}")
    curves, other_curves = scalars(run, folder / "run"), scalars(reference, folder / "reference")
    for tag in sorted(curves.keys() | other_curves.keys()):
        mine_curve, other_curve = curves.get(tag, []), other_curves.get(tag, [])
        numbers = [step for step, _ in mine_curve]
        if tag == "generator/loss" and numbers != list(range(1, steps + 1)):
            wrong = sorted({*range(1, steps + 1)} ^ {*numbers} | {n for n in numbers if numbers.count(n) > 1})
            raise Failed(f"{tag}: not every step once, in order; {len(wrong)} are wrong: {wrong[:10]}")
        if mine_curve != other_curve:
            unlike = [pair for pair in zip(mine_curve, other_curve, strict=False) if pair[0] != pair[1]][:1]
            raise Failed(f"{tag}: {len(mine_curve)} and {len(other_curve)} points, first difference {unlike}")
    named = set()
    for step in checkpoint.steps(run):
        named |= {f"checkpoints/{step:08d}.json"}
        named |= {str(entry["key"]) for entry in checkpoint.verify(run, step).files.values()}
    if orphans := {entry.key for entry in run.list("checkpoints/")} - named:
        raise Failed(f"{len(orphans)} objects that no commit names: {sorted(orphans)[:3]}")
    if uploads := server.client().list_multipart_uploads(Bucket="runs").get("Uploads", []):
        raise Failed(f"{len(uploads)} multipart uploads are open: {uploads[0]['Key']}")


def final_state(run: storage.Store, steps: int) -> checkpoint.Tensors:
    """The state after so many steps, which must be the newest."""
    found = checkpoint.newest(run)
    if found is None or found[0].step != steps:
        raise Failed(f"the newest checkpoint of {run.uri} is not that of step {steps}")
    return found[1]


def scalars(run: storage.Store, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalar curves as TensorBoard shows them."""
    # Here because it is slow to import.
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    for entry in run.list("events/"):
        path = folder / entry.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(run.read(entry.key))
    events = event_accumulator.EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's type, shape and bytes."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + data


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def left_over(token: str) -> list[str]:
    """Processes that carry this run's mark in their environment, apart from this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if path.name != str(os.getpid()) and f"{MARK}={token}\0".encode() in (path / "environ").read_bytes():
                found.append(f"{path.name} {(path / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()[:80]}")
    return found
