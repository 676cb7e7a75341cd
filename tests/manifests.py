"""What the tests of k8s/ share: reading the manifests, the pods that they make, and what Kubernetes would refuse."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from conftest import ROOT

from autopainter import __version__

K8S = ROOT / "k8s"
IMAGE = f"registry.example.com/auto-painter:{__version__}"

Document = dict[str, Any]

# Pod Security Standards, profile "restricted" with all of "baseline" in it.
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range",
}  # fmt: skip
_SELINUX = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


class Manifest(NamedTuple):
    """One document of one file."""

    path: Path
    document: Document

    @property
    def name(self) -> str:
        """File, kind and name, for messages."""
        return f"{self.path.relative_to(ROOT)}: {self.document['kind']} {self.document['metadata']['name']}"


class Pod(NamedTuple):
    """The pod that a template makes: its place, and the pod itself."""

    name: str
    document: Document

    @property
    def spec(self) -> Document:
        """Of the pod."""
        spec: Document = self.document["spec"]
        return spec

    @property
    def containers(self) -> list[Document]:
        """All of them, with init containers and sidecars."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def load(path: Path) -> list[Manifest]:
    """The documents of a file."""
    return [Manifest(path, document) for document in yaml.safe_load_all(path.read_text()) if document]


def everything() -> list[Manifest]:
    """All manifests below k8s/, folder by folder in the order in which ``kubectl apply -f FOLDER`` takes them."""
    return [manifest for path in sorted(K8S.rglob("*.yaml")) for manifest in load(path)]


def one(kind: str, name: str) -> Document:
    """The only manifest of this kind and name."""
    (found,) = [
        m.document for m in everything() if (m.document["kind"], m.document["metadata"]["name"]) == (kind, name)
    ]
    return found


def bytes_of(quantity: str) -> int:
    """Bytes of a quantity such as 8Gi."""
    number, unit = quantity[:-2], quantity[-2:]
    return int(number) << {"Ki": 10, "Mi": 20, "Gi": 30}[unit]


def cores(quantity: str) -> float:
    """Cores of a quantity such as 250m."""
    return int(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def ray_groups(document: Document) -> list[Document]:
    """The head group and the worker groups of a RayJob or RayCluster; none of anything else."""
    if document["kind"] not in ("RayJob", "RayCluster"):
        return []
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def _templates(document: Document) -> Iterator[tuple[str, Document]]:
    kind, spec = document["kind"], document.get("spec", {})
    if kind in ("Deployment", "StatefulSet", "Job"):
        yield "pod", spec["template"]
    if kind == "RayJob":
        yield "submitter", spec["submitterPodTemplate"]
    for group in ray_groups(document):
        yield group.get("groupName", "head"), group["template"]


def pods(manifest: Manifest) -> list[Pod]:
    """The pods of a manifest, one for each template; what validators know nothing of inside a RayJob."""
    return [
        Pod(f"{manifest.name}: {place}", {"apiVersion": "v1", "kind": "Pod", **template})
        for place, template in _templates(manifest.document)
    ]


def all_pods() -> list[Pod]:
    """The pods of all manifests."""
    return [pod for manifest in everything() for pod in pods(manifest)]


def not_restricted(pod: Pod) -> list[str]:
    """What the restricted Pod Security profile refuses in a pod."""
    spec, found = pod.spec, []
    context = spec.get("securityContext", {})
    found += [field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    found += [f"volume {v['name']}" for v in spec.get("volumes", []) if not (v.keys() - {"name"}) <= _VOLUMES]
    found += [f"sysctl {s['name']}" for s in context.get("sysctls", []) if s["name"] not in _SYSCTLS]
    found += [f"pod {problem}" for problem in _identity(context)]
    for container in pod.containers:
        own = container.get("securityContext", {})
        effective = {**context, **own}
        capabilities = own.get("capabilities", {})
        problems = [
            *_identity(own),
            *(["privileged"] if own.get("privileged") else []),
            *(["allowPrivilegeEscalation"] if own.get("allowPrivilegeEscalation") is not False else []),
            *(["capabilities.drop"] if "ALL" not in capabilities.get("drop", []) else []),
            *(["capabilities.add"] if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"} else []),
            *(["procMount"] if own.get("procMount", "Default") != "Default" else []),
            *(["runAsNonRoot"] if effective.get("runAsNonRoot") is not True else []),
            *(["seccompProfile"] if not _seccomp(effective) else []),
            *(["hostPort"] if any(port.get("hostPort") for port in container.get("ports", [])) else []),
            *(["probe host"] if any(_host(container.get(f"{p}Probe", {})) for p in _PROBES) else []),
        ]
        found += [f"container {container['name']}: {problem}" for problem in problems]
    return found


_PROBES = ("startup", "readiness", "liveness")


def _identity(context: Document) -> list[str]:
    linux = context.get("seLinuxOptions", {})
    return [
        *(["runAsUser"] if context.get("runAsUser") == 0 else []),
        *(["seLinuxOptions"] if linux.get("type") not in _SELINUX or linux.keys() & {"user", "role"} else []),
        *(["windowsOptions"] if context.get("windowsOptions", {}).get("hostProcess") else []),
        *(["appArmorProfile"] if context.get("appArmorProfile", {}).get("type") == "Unconfined" else []),
    ]


def _seccomp(context: Document) -> bool:
    return context.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost")


def _host(probe: Document) -> bool:
    return any(probe.get(kind, {}).get("host") for kind in ("httpGet", "tcpSocket"))
