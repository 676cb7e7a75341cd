"""The cluster of k8s/ on this machine, and a training run that must survive what happens to its pods.

Builds the image and plays Kubernetes with Docker: the pods of the manifests (storage, TensorBoard, the RayJob's head
and two workers with their metrics containers) run as containers under the manifests' security settings and with the
commands of KubeRay, in a network of their own. Only what a machine without GPUs cannot give is other: GPUs, the size
of memory limits, and the size of the network that is trained. A data set is packed and the RayJob's entrypoint trains,
both by `ray job submit` in a submitter pod, once undisturbed and once with faults:

- term: a worker's pod is deleted (SIGTERM, then the grace period);
- memory: a worker's container meets its memory limit, and the kernel kills the training process in it;
- worker: a worker's container dies whole, as the kubelet on cgroup v2 lets it when one process meets the limit;
- head: the head's container dies; the submitter submits the same job again.

It holds, or the exit code is 1 and the folder with all logs stays: the run ends in the same tensors and curves as the
undisturbed one, bit for bit; each fault showed its effect; Prometheus has scraped both, and TensorBoard shows both.

    bash scripts/cluster_e2e.sh                           # needs root, Docker, debootstrap and Prometheus
    bash scripts/cluster_e2e.sh --base python:3.11-slim-bookworm      # where images can be pulled
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import e2e_faults
from chaos_watch import Failed
from e2e_docker import BASE, Docker, Engine, build, make_base
from e2e_faults import KINDS
from e2e_manifests import STEPS
from e2e_scenario import Scenario
from processes import ServiceError
from trial import trial

from autopainter.errors import StorageError

TAG = "auto-painter:e2e"


def run(options: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    """The whole test; ``Failed`` if something does not hold. What is measured goes into ``result``."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    with contextlib.ExitStack() as stack:
        docker = Docker()
        if not docker.answers():
            say("no Docker engine answers: starting one")
            docker = Docker(stack.enter_context(Engine()).host)
        if not options.image:
            if options.base == BASE:
                say("making a base image of Debian packages")
                make_base(docker, folder)
            say("building the image, and trying it")
            build(docker, TAG, options.base, folder / "build.log")
        image = options.image or TAG
        size = int(docker("image", "inspect", "--format", "{{.Size}}", image)) / 1e9
        place = Scenario(docker, image, folder, options.steps)
        place.facts.append(("image", f"{size:.2f} GB"))
        result["facts"] = place.facts
        say("starting the pods")
        with place.pods():
            place.check_cluster()
            say("packing")
            place.prepare()
            say(f"the undisturbed run, {options.steps} steps")
            place.undisturbed()
            say("the run that is disturbed")
            with place.training():
                for kind in options.kinds:
                    fault = e2e_faults.suffer(place, kind)
                    result["faults"].append(fault)
                    say(f"{kind}: {fault.lost} steps lost, new steps after {fault.seconds:.0f} s; {fault.seen}")
            say("comparing")
            place.check_end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="one that scripts/image.sh has built; none: build one")
    parser.add_argument("--base", default=BASE, help="base of the image; none: Debian's packages, by debootstrap")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the run ({STEPS})")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help="only these faults")
    parser.add_argument("--folder", type=Path, help="where logs go, and stay; none: a temporary folder")
    parser.add_argument("--json", type=Path, help="write what is measured to this file")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))} not of {', '.join(KINDS)}")
    if os.geteuid() != 0:
        parser.error("root is needed: the pods' folders belong to their user")
    if shutil.which("prometheus") is None:
        parser.error("prometheus is not installed")
    result: dict[str, Any] = {"faults": [], "facts": []}
    failures = (Failed, ServiceError, StorageError, OSError)
    with trial(options.folder, "ap-e2e-", failures, place="/tmp") as held:
        run(options, held.folder, result)
    seconds = held.seconds
    print(e2e_faults.table(result["faults"]))
    print("\n".join(f"{what}: {how}" for what, how in result["facts"]))
    if options.json:
        faults = [dataclasses.asdict(fault) for fault in result["faults"]]
        options.json.write_text(
            json.dumps({**result, "faults": faults, "failed": held.failed, "seconds": seconds}, indent=1)
        )
    return held.conclude(f"{len(result['faults'])} faults, {seconds:.0f} s in all: all holds")


if __name__ == "__main__":
    sys.exit(main())
