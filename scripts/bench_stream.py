"""Streams of training data side by side: ours, webdataset, MosaicML Streaming and LitData.

All read the same encoded pictures from one S3 server on this machine. Every measure of every stream runs in a process
of its own, with empty caches, and all streams take turns in each round. What is measured, and how, is in ``peers.py``.
It needs some minutes on a quiet machine, and the peers in an environment of their own, which it makes the first time.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from measuring import MemoryWatch, cpu
from peers import MEASURES, STREAMS, Spec, samples_of
from processes import HOST, child_env
from services import SeaweedFS

from autopainter import config

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "peers.txt"
OURS = {"ours", "ours-cached"}
BUCKET = "datasets"
TIMEOUT_SECONDS = 300.0
"""A process that takes longer is taken for hung, and ended."""

CROP_SHARE = 512 / 530
AUDITS = 2
"""Rounds that count bytes and memory, which vary little."""
"""Time between two looks at the memory."""
MIB = 1 << 20


class CountingProxy:
    """Forwards TCP connections to a server and counts the bytes that it sends."""

    def __init__(self, port: int) -> None:
        self.target, self.bytes = port, 0
        self._lock = threading.Lock()
        self._server = socket.create_server((HOST, 0))
        self.endpoint = f"http://{HOST}:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection((HOST, self.target))
                for source, sink, counts in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pump, args=(source, sink, counts), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):  # one side is gone
            while data := source.recv(1 << 18):
                sink.sendall(data)
                if counts:
                    with self._lock:
                        self.bytes += len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections."""
        self._server.close()


@dataclasses.dataclass(frozen=True)
class Variant:
    """A stream with a number of workers or threads."""

    system: str
    parallel: int


class Bench:
    """Storage with the three data sets, and what was measured on it."""

    def __init__(self, folder: Path, server: SeaweedFS, peers_python: Path, systems: tuple[str, ...]) -> None:
        self.folder, self.server, self.peers_python, self.systems = folder, server, peers_python, systems
        self.results: dict[tuple[Variant, str], list[dict[str, Any]]] = defaultdict(list)
        self.failures: list[str] = []

    def prepare(self, data: Path) -> list[Path]:
        """Put a packed data set into storage, in all formats; its training shards."""
        tars = sorted(data.glob("train-*.tar"))
        if not tars:
            raise click.ClickException(f"{data}: no training shards; make them with 'autopainter pack'")
        folders = {"ours": data}
        if peers := {"mosaic", "litdata"} & set(self.systems):
            made = self.folder / "converted"
            made.mkdir()
            self.run(str(self.peers_python), {"convert": [str(tar) for tar in tars], "folder": str(made)}, {})
            folders |= {name: made / name for name in peers}
        client = self.server.client()
        for name, place in folders.items():
            for path in (path for path in place.rglob("*") if path.is_file()):
                client.upload_file(str(path), BUCKET, f"bench/{name}/{path.relative_to(place)}")
        shutil.rmtree(self.folder / "converted", ignore_errors=True)
        return tars

    def run(self, python: str, request: dict[str, Any], env: dict[str, str], proxy: CountingProxy | None = None) -> Any:
        """One process of peers.py; its result, for an audit with the bytes read by its marks and its peak memory."""
        scratch = self.folder / "scratch"
        places = {"HOME": str(scratch), "TMPDIR": str(scratch), "S3_ENDPOINT_URL": env.get("AWS_ENDPOINT_URL", "")}
        scratch.mkdir()
        log = (self.folder / "peers.log").open("w+")
        process = subprocess.Popen(
            [python, str(HERE / "peers.py"), json.dumps(request)],
            env=child_env(env | places), stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
        timer = threading.Timer(TIMEOUT_SECONDS, _kill_group, (process.pid,))
        timer.start()
        watch = MemoryWatch(process.pid) if proxy else None
        if watch:
            watch.start()
        result: dict[str, Any] | None = None
        marks: list[int] = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                said = json.loads(line)
                if "result" in said:
                    result = said
                elif proxy:
                    marks.append(proxy.bytes)
            code = process.wait()
            if code or (result is None and "convert" not in request):
                log.seek(0)
                raise click.ClickException(f"{python} {request}: exit code {code}\n{log.read()[-3000:]}")
        finally:
            timer.cancel()
            _kill_group(process.pid)  # also workers that outlive it
            process.wait()
            log.close()
            left = sum(path.lstat().st_size for path in scratch.rglob("*") if path.is_file())
            peak = watch.stop() if watch else 0
            shutil.rmtree(scratch)
        return (result or {}) | {"left": left, "peak": peak, "marks": marks}

    def measure(self, variant: Variant, measure: str, spec: dict[str, Any], check: bool) -> None:
        """Run one measure and keep its result; a failure is told and kept."""
        state = self.folder / f"{variant.system}-{variant.parallel}.state"
        request = Spec(
            system=variant.system, parallel=variant.parallel, measure=measure, decode=measure != "fetched",
            scratch=str(self.folder / "scratch"), state=str(state), check=check, **spec,
        )  # fmt: skip
        python = sys.executable if variant.system in OURS else str(self.peers_python)
        proxy = CountingProxy(self.server.port) if measure == "audit" else None
        env = self.server.env | ({"AWS_ENDPOINT_URL": proxy.endpoint} if proxy else {})
        try:
            result = self.run(python, dataclasses.asdict(request), env, proxy)
            self.results[variant, measure].append(result)
        except click.ClickException as error:
            self.failures.append(f"{variant.system} {variant.parallel} {measure}")
            click.echo(error.message, err=True)
        finally:
            if proxy:
                proxy.close()


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def needed_bytes(tars: list[Path]) -> tuple[int, int]:
    """Number of samples of shards and the bytes of their encoded pictures."""
    sizes = [len(sample["color"]) + len(sample["sketch"]) for tar in tars for sample in samples_of(str(tar))]
    return len(sizes), sum(sizes)


def best(bench: Bench, system: str, measure: str, parallels: list[int]) -> tuple[int, list[dict[str, Any]]] | None:
    """The number of workers whose median is best, with its results."""
    higher = measure in ("fetched", "decoded")
    found = [
        (statistics.median(result["result"] for result in results) * (1 if higher else -1), parallel, results)
        for parallel in parallels
        if (results := bench.results[Variant(system, parallel), measure])
    ]
    return max(found, key=lambda entry: entry[0])[1:] if found else None


def rows(bench: Bench, parallels: list[int], needed: int) -> Iterator[dict[str, Any]]:
    """What the table shows, a row for each measure of each system."""
    for measure, unit in {
        "fetched": "samples/s, encoded", "decoded": "samples/s, decoded",
        "start": "s to the first batch", "resume": "s to the first batch, resumed",
    }.items():  # fmt: skip
        for system in bench.systems:
            if chosen := best(bench, system, measure, parallels):
                yield _row(unit, system, chosen[0], [result["result"] for result in chosen[1]])
    audits = {system: (chosen[0], bench.results[Variant(system, chosen[0]), "audit"])
              for system in bench.systems if (chosen := best(bench, system, "decoded", parallels))}  # fmt: skip
    for name, value in {
        "bytes read / needed, epoch 1": lambda audit: audit["marks"][0] / needed,
        "bytes read / needed, epoch 2": lambda audit: (audit["marks"][1] - audit["marks"][0]) / needed,
        "MiB memory, peak": lambda audit: audit["peak"] / MIB,
        "MiB left on disk": lambda audit: audit["left"] / MIB,
        "samples missing in epoch 1": lambda audit: audit["missing"],
        "samples repeated in epoch 1": lambda audit: audit["repeated"],
    }.items():
        for system, (parallel, results) in audits.items():
            if results:
                yield _row(name, system, parallel, [value(result) for result in results])
    for system, (parallel, _) in audits.items():
        if resumed := bench.results[Variant(system, parallel), "resume"]:
            checks = {
                "same": all(result["same"] for result in resumed),
                "set": all(result["set"] for result in resumed),
            }
            text = "the same" if checks["same"] else "other order" if checks["set"] else "other samples"
            yield {"measure": "order after resuming", "system": system, "parallel": parallel, "text": text}


def _row(measure: str, system: str, parallel: int, values: list[float]) -> dict[str, Any]:
    return {"measure": measure, "system": system, "parallel": parallel, "median": statistics.median(values),
            "values": values}  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """The rows in Markdown, each beside that of webdataset."""
    lines = ["| measure | stream (workers) | median | range | to webdataset |", "| --- | --- | ---: | ---: | ---: |"]
    base = {row["measure"]: row["median"] for row in found if row["system"] == "webdataset" and "median" in row}
    shown = None
    for row in found:
        name = "" if row["measure"] == shown else row["measure"]
        shown = row["measure"]
        stream = f"{row['system']} ({row['parallel']})"
        if "text" in row:
            lines.append(f"| {name} | {stream} | {row['text']} | | |")
            continue
        ratio = f"{row['median'] / base[shown]:.2f}x" if base.get(shown) else ""
        low, high = (f"{value:.4g}" for value in (min(row["values"]), max(row["values"])))
        lines.append(f"| {name} | {stream} | {row['median']:.4g} | {low} - {high} | {ratio} |")
    return "\n".join(lines)


def machine(peers_python: Path) -> dict[str, str]:
    """What it ran on."""
    names = ["torch", "numpy", "opencv-python-headless", "boto3", "webdataset", "litdata", "mosaicml-streaming"]
    listed = subprocess.run([peers_python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True)
    theirs = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout or "[]")}
    ours = {name: importlib.metadata.version(name) for name in names[:4]}
    return {
        "cpu": cpu(),
        "python": platform.python_version(),
        "ours": ", ".join(f"{name} {version}" for name, version in ours.items()),
        "peers": ", ".join(f"{name} {theirs[name]}" for name in names if name in theirs),
    }


def peers_environment(folder: Path) -> Path:
    """The interpreter of the peers' environment, which is made if it is not there."""
    python = folder / "bin" / "python"
    stamp = folder / ".installed"
    if not stamp.exists() or stamp.read_text() != REQUIREMENTS.read_text():
        click.echo(f"installing {REQUIREMENTS.name} into {folder} ...", err=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS], check=True)
        stamp.write_text(REQUIREMENTS.read_text())
    return python


def pack(folder: Path, samples: int, size: int, shard_samples: int) -> None:
    """OpenMoji as ``autopainter pack`` stores it."""
    program = Path(sys.executable).parent / "autopainter"
    options = ["--size", size, "--limit", samples, "--shard-samples", shard_samples]
    command = [str(program), "pack", "openmoji", str(folder), *map(str, options)]
    subprocess.run(command, check=True, stdout=sys.stderr)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--samples", default=3000, show_default=True, help="Pictures to pack; a few are held out or left out.")
@click.option("--size", default=512, show_default=True, help="Edge of the pictures, stored and delivered.")
@click.option("--dataset", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder with a packed data set to use instead of OpenMoji.")  # fmt: skip
@click.option("--shard-samples", default=512, show_default=True, help="Samples of a shard, in all formats.")
@click.option("--rounds", default=5, show_default=True, help="Times that everything is measured.")
@click.option("--batch", default=16, show_default=True, help="Samples of a batch.")
@click.option("--workers", default="1,2", show_default=True, help="Worker processes (ours: threads) to try.")
@click.option("--only", default=",".join(STREAMS), show_default=True, help="Streams to compare.")
@click.option("--measures", default=",".join(MEASURES), show_default=True, help="Measures to take.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for all values.")
@click.option("--peers-venv", type=click.Path(path_type=Path), default="build/peers-venv", show_default=True,
              help="Environment of the peers; made if it is not there.")  # fmt: skip
def bench_stream(
    samples: int, size: int, dataset: Path | None, shard_samples: int, rounds: int, batch: int, workers: str,
    only: str, measures: str, json_file: Path | None, peers_venv: Path,
) -> None:  # fmt: skip
    """Compare streams of training data on this machine, and print a Markdown table."""
    systems = tuple(only.split(","))
    if unknown := set(systems) - STREAMS.keys() | set(measures.split(",")) - MEASURES.keys():
        raise click.BadParameter(f"unknown: {', '.join(sorted(unknown))}")
    if "ours-cached" in systems and "data.cache" not in config.fields():
        systems = tuple(system for system in systems if system != "ours-cached")
    peers_python = peers_environment(peers_venv.absolute()) if set(systems) - OURS else Path(sys.executable)
    parallels = [int(number) for number in workers.split(",")]
    with contextlib.ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ap-bench-", dir="/tmp")))
        server = cleanup.enter_context(SeaweedFS(folder / "storage", buckets=(BUCKET,)))
        bench = Bench(folder, server, peers_python, systems)
        if dataset is None:
            pack(dataset := folder / "packed", samples, size, shard_samples)
        tars = bench.prepare(dataset)
        count, needed = needed_bytes(tars)
        spec = {"batch": batch, "size": size, "crop_share": CROP_SHARE, "samples": count,
                "shards": [tar.name for tar in tars], "uri": f"s3://{BUCKET}/bench"}  # fmt: skip
        variants = [Variant(system, parallel) for system in systems for parallel in parallels]
        began = time.monotonic()
        for number in range(rounds):
            for measure in (name for name in MEASURES if name in measures.split(",")):
                if measure == "audit" and number >= AUDITS:
                    continue
                for variant in variants[number % len(variants) :] + variants[: number % len(variants)]:
                    bench.measure(variant, measure, spec, check=number == 0)
            click.echo(f"round {number + 1} of {rounds}: {time.monotonic() - began:.0f} s", err=True)
    found = list(rows(bench, parallels, needed))
    about = machine(peers_python)
    click.echo(f"{count} samples, {needed / count / 1024:.1f} KiB each, in {len(tars)} shards; batches of {batch};"
               f" {rounds} rounds; {about['cpu']}; Python {about['python']}; ours: {about['ours']};"
               f" peers: {about['peers']}\n\n{table(found)}")  # fmt: skip
    if bench.failures:
        click.echo(f"\nFailed: {', '.join(bench.failures)}")
    if json_file:
        json_file.write_text(json.dumps({"machine": about, "samples": count, "needed_bytes": needed, "rows": found,
                                         "rounds": rounds, "failures": bench.failures}, indent=1))  # fmt: skip


def _terminate(*_: object) -> None:
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    bench_stream()
