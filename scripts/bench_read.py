"""How fast is a checkpoint's file read from S3 again: over one connection, and in parts over several?

Both take turns against a SeaweedFS on this machine, which shares its cores.

    .venv/bin/python scripts/bench_read.py
"""

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measuring import cpu
from services import SeaweedFS

from autopainter.storage import open_store
from autopainter.storage.s3 import CONNECTIONS, PART_BYTES


def seconds(do: Callable[[], object]) -> float:
    began = time.monotonic()
    do()
    return time.monotonic() - began


def measure(mib: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way to read an object, in turns."""
    store, size = open_store("s3://runs/bench"), mib << 20
    store.write("file", os.urandom(size))
    ways = {
        "one connection": lambda: store.read("file"),
        f"{CONNECTIONS} connections, {PART_BYTES >> 20} MiB each": lambda: store.read_large("file", size),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in sorted(ways, reverse=bool(number % 2)):
            spent = seconds(ways[name])
            if number:  # the first round connects, and fills the server's cache
                found[name].append(spent)
    return found


def main() -> int:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="Size of the file.")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, SeaweedFS(Path(folder)) as server:
        os.environ.update(server.env)
        found = measure(options.mib, options.rounds)
    hashing = seconds(lambda: hashlib.sha256(bytes(options.mib << 20)))
    print(f"{cpu()}; {options.mib} MiB, {hashing:.2f} s for its sha256; medians of {options.rounds} (least - most)\n")
    print("| read over | seconds | MB/s | of one |\n| --- | ---: | ---: | ---: |")
    one = statistics.median(found["one connection"])
    for name, values in found.items():
        middle = statistics.median(values)
        rate = (options.mib << 20) / 1e6 / middle
        print(f"| {name} | {middle:.2f} ({min(values):.2f} - {max(values):.2f}) | {rate:.0f} | {one / middle:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
