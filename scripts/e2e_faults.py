"""What happens to the pods of ``cluster_e2e.py``'s run."""

import dataclasses
import time
from collections.abc import Callable

from chaos_watch import Failed
from e2e_pods import Pod
from e2e_scenario import Scenario

from autopainter import journal

KINDS = ("term", "memory", "worker", "head")
PROGRESS_STEPS = 15
"""Least steps between a start and the next fault."""
_KILL_SECONDS = 30.0
# All that is free, what the kernel can free (files in its cache), and some more: the kernel looks for a process to
# kill, and Ray has told it to take its workers, the largest first. The raylet sleeps meanwhile: its own monitor, which
# would kill at 90 % of the limit, is not what is tried here.
_ALLOCATE = """
import mmap, os, pathlib, re, signal
v1, v2 = pathlib.Path("/sys/fs/cgroup/memory"), pathlib.Path("/sys/fs/cgroup")
names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1.exists() else ("memory.max", "memory.current")
place = v1 if v1.exists() else v2
programs = {path.read_text().strip(): int(path.parent.name) for path in pathlib.Path("/proc").glob("[0-9]*/comm")}
raylet = programs["raylet"]
os.kill(raylet, signal.SIGSTOP)
try:
    limit, used = (int((place / name).read_text()) for name in names)
    stat = (place / "memory.stat").read_text()
    cached = sum(map(int, re.findall(r"^(?:in)?active_file (\\d+)", stat, re.MULTILINE)))
    size = limit - used + cached + (300 << 20)
    if not (child := os.fork()):
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        os._exit(0)
    os.waitpid(child, 0)
finally:
    os.kill(raylet, signal.SIGCONT)
"""
# A process that has been killed is there until the raylet has seen it.
_TRAINERS = """
for process in /proc/[0-9]*; do
    grep -qs "^Name:.ray::RayTrainWo" $process/status && ! grep -qs "^State:.[ZX]" $process/status && echo $process
done
true
"""
_KERNEL_KILLS = "cat /sys/fs/cgroup/memory/memory.oom_control /sys/fs/cgroup/memory.events 2>/dev/null"

Seen = Callable[[], str]
"""Says what was seen of a fault once the run goes on; ``Failed`` if it is not what should be."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What became of a fault.

    Attributes:
        step: last step seen of the start that it ended.
        lost: steps that were done again.
        seconds: from the fault to the first step beyond ``step``.
        seen: what else was seen.
    """

    kind: str
    step: int
    lost: int
    seconds: float
    seen: str


def suffer(place: Scenario, kind: str) -> Fault:
    """One fault of KINDS, and what becomes of it."""

    def is_enough() -> bool:
        if place.submission.finished:
            raise Failed(f"{kind}: the run ended before this fault; it needs more --steps")
        return place.current.last - place.current.start >= PROGRESS_STEPS and place.current.saved > 0

    place.until(is_enough, f"progress before {kind}")
    old, entries, began = place.current, len(journal.read(place.run)), time.monotonic()
    seen = {"term": _term, "memory": _memory, "worker": _worker, "head": _head}[kind](place)
    place.until(lambda: place.runlog.first_beyond(old) is not None, f"a new step after {kind}")
    done = place.runlog.first_beyond(old)
    assert done is not None
    kinds = sorted({entry.kind for entry in journal.read(place.run)[entries:]})
    words = f"{seen()}; journal: {', '.join(kinds) or 'nothing'}"
    return Fault(kind, old.last, max(old.last - place.current.start, 0), done - began, words)


def table(faults: list[Fault]) -> str:
    """The faults as a Markdown table."""
    lines = [
        "| fault | at step | steps lost | seconds to the first new step | seen |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    lines += [f"| {f.kind} | {f.step} | {f.lost} | {f.seconds:.0f} | {f.seen} |" for f in faults]
    return "\n".join(lines)


def _oldest(place: Scenario) -> Pod:
    """The worker that has been up for longest."""
    return place.cluster.workers[0]


def _term(place: Scenario) -> Seen:
    pod, began, old = _oldest(place), time.monotonic(), place.current
    place.kubelet.delete(pod)
    place.until(lambda: pod.exit_code is not None, "the end of the worker after SIGTERM")
    seconds = time.monotonic() - began

    def seen() -> str:
        if place.current.start < old.last:
            raise Failed(f"term: {old.last - place.current.start} steps were lost though there was time to save")
        return f"saved first; the worker ended after {seconds:.0f} s with exit code {pod.exit_code}; a new pod"

    return seen


def _memory(place: Scenario) -> Seen:
    pod = _oldest(place)
    before, trainers = _kernel_kills(place, pod), _trainers(place, pod)
    if not trainers:
        raise Failed(f"memory: no training process in {pod.main}")

    def is_killed() -> bool:
        done = place.docker.try_("exec", pod.main, "python3", "-c", _ALLOCATE)
        if done.returncode:
            raise Failed(f"memory: {done.stderr.strip()[-300:]}")
        return _kernel_kills(place, pod) > before

    place.until(is_killed, "memory: the kernel's kill", _KILL_SECONDS)
    if not trainers - _trainers(place, pod):
        raise Failed("memory: the kernel has killed something else than the training process")
    killed = _kernel_kills(place, pod) - before
    return lambda: f"the kernel killed {killed} of its processes, the training one among them; {_fate(pod)}"


def _trainers(place: Scenario, pod: Pod) -> set[str]:
    """Training processes of a container."""
    return set(place.docker.try_("exec", pod.main, "sh", "-c", _TRAINERS).stdout.split())


def _kernel_kills(place: Scenario, pod: Pod) -> int:
    """Processes of a container that the kernel has killed for its memory limit."""
    lines = place.docker.try_("exec", pod.main, "sh", "-c", _KERNEL_KILLS).stdout.splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _fate(pod: Pod) -> str:
    return "it went on" if pod.exit_code is None else f"it ended with exit code {pod.exit_code}; a new pod"


def _worker(place: Scenario) -> Seen:
    pod = _oldest(place)
    place.docker("kill", "--signal", "KILL", pod.main)
    place.until(lambda: pod.exit_code is not None, "the end of the worker")
    return lambda: f"the container {_fate(pod).removeprefix('it ')}"


def _head(place: Scenario) -> Seen:
    head, submission, workers = place.cluster.head, place.submission, list(place.cluster.workers)
    restarts, tries = head.restarts, len(submission.codes)
    place.docker("kill", "--signal", "KILL", head.main)
    place.until(lambda: head.restarts > restarts and len(submission.codes) > tries, "the submitter's next try")

    def seen() -> str:
        new = len([pod for pod in place.cluster.workers if pod not in workers])
        return (f"the head's container restarted; the submitter ended with {submission.codes[tries]}, the next one"
                f" submitted {submission.id} again; {new} new worker pods")  # fmt: skip

    return seen
