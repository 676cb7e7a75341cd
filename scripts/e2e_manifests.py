"""What ``cluster_e2e.py`` takes from k8s/: the objects, made small enough for one machine without GPUs."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("k8s", "k8s/storage", "k8s/monitoring")
MEMORY = {"head": "3g", "worker": "2500m", "storage": "1g", "tensorboard": "1g", "submitter": "1g"}
"""Memory limits of the components' main containers instead of the manifests'; a sidecar keeps its own."""
OBJECT_STORE_BYTES = 100_000_000
SHM = "256m"
STEPS = 1000
SMALL: dict[str, Any] = {
    "data": {"image_size": 32, "decode_threads": 1, "prefetch_batches": 2, "fetch_ahead_batches": 2},
    "model": {"generator_width": 8, "discriminator_width": 8},
    "train": {"global_batch": 8, "microbatch": None, "precision": "float32", "threads": 1},
    "checkpoint": {"every_seconds": 5},
    "telemetry": {"log_every_steps": 1, "image_every_steps": 500, "images": 4},
    "cluster": {"workers": 2, "gpus": False, "cpus_per_worker": 1},
}  # fmt: skip
"""Fields of the training configuration that are other than in the manifests."""


@dataclass
class Template:
    """A pod to be.

    Attributes:
        name: of the pods made from it.
        spec: as in a manifest.
        labels: of the pods.
        commands, env: of containers by name, as an operator sets them; they come on top of the manifest's.
        hosts: names under which other pods find it.
    """

    name: str
    spec: dict[str, Any]
    labels: dict[str, str]
    commands: dict[str, list[str]] = field(default_factory=dict)
    env: dict[str, dict[str, str]] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def main(self) -> str:
        """Name of the container that the pod is for."""
        return str(self.spec["containers"][0]["name"])


class Manifests:
    """The objects of k8s/ by kind and name.

    Args:
        secrets: by name, which the manifests leave to their user.
        steps: that the run has.
    """

    def __init__(self, secrets: dict[str, dict[str, str]], steps: int) -> None:
        self.secrets = secrets
        self._objects = {(item["kind"], item["metadata"]["name"]): item for item in _objects()}
        settings = yaml.safe_load(self.config_map("autopainter-config")["train.yaml"])
        for section, values in SMALL.items():
            settings.setdefault(section, {}).update(values)
        settings["train"]["steps"] = steps
        self.run = str(settings["run"]["name"])
        self.config_map("autopainter-config")["train.yaml"] = yaml.safe_dump(settings)
        self.settings: dict[str, Any] = settings

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """An object; its own, to be changed."""
        return self._objects[kind, name]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All objects of a kind."""
        return [item for (its_kind, _), item in self._objects.items() if its_kind == kind]

    def config_map(self, name: str) -> dict[str, str]:
        """The data of a ConfigMap."""
        data: dict[str, str] = self.get("ConfigMap", name)["data"]
        return data

    def workload(self, kind: str, name: str) -> Template:
        """The pod of a Deployment or StatefulSet, found under the name of its Service, which is the same."""
        pod = self.get(kind, name)["spec"]["template"]
        hosts = (name,) if ("Service", name) in self._objects else ()
        return Template(name, copy.deepcopy(pod["spec"]), pod["metadata"]["labels"], hosts=hosts)

    def container_env(self, container: dict[str, Any]) -> dict[str, str]:
        """The environment that a manifest gives a container."""
        env: dict[str, str] = {}
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                env |= self.config_map(source["configMapRef"]["name"])
            else:
                env |= self.secrets[source["secretRef"]["name"]]
        return env | {entry["name"]: entry["value"] for entry in container.get("env", [])}


def _objects() -> Iterator[dict[str, Any]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.yaml")):
            yield from filter(None, yaml.safe_load_all(path.read_text()))
