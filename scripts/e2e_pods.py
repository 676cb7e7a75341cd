"""Pods as containers on one machine, by the rules of the kubelet that matter when something dies.

A pod is a sandbox, which holds its address, and containers in its network with folders of their own kind: those of an
``emptyDir`` live as long as the pod and outlast a container; a claim's outlasts the pod. What a manifest says of users,
capabilities, privileges, the root file system, memory and the grace period is what Docker is told.
"""

import contextlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e_docker import Docker
from e2e_manifests import MEMORY, SHM, Manifests, Template

LABEL = "auto-painter-e2e"
SANDBOX_MEMORY = "64m"


@dataclass
class Pod:
    """A pod that was started.

    Attributes:
        name: unique; also the beginning of its containers' names.
        ip: its address.
        folder: where its volumes are.
        ended: exit codes of the containers that have ended and are not started again.
        restarts: of its main container.
        leaving: the command that stops its main container, once it is being deleted.
    """

    name: str
    template: Template
    ip: str
    folder: Path
    ended: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    leaving: "subprocess.Popen[bytes] | None" = None

    @property
    def main(self) -> str:
        """Docker's name of its main container."""
        return f"{self.name}-{self.template.main}"

    @property
    def exit_code(self) -> int | None:
        """Of its main container, if that has ended for good."""
        return self.ended.get(self.template.main)


class Kubelet:
    """Starts pods, restarts containers, and removes pods.

    Args:
        network: of Docker, which all pods are in.
        folder: for volumes and logs.
    """

    def __init__(self, docker: Docker, network: str, image: str, folder: Path, manifests: Manifests) -> None:
        self._docker, self._network, self._image, self._manifests = docker, network, image, manifests
        self._volumes, self.logs = folder / "volumes", folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.pods: list[Pod] = []
        self._count = 0

    def start(self, template: Template) -> Pod:
        """Start a new pod: sandbox, sidecars, then its container."""
        self._count += 1
        name = f"{self._network}-{template.name}-{self._count}"
        aliases = [option for host in template.hosts for option in ("--network-alias", host)]
        self._docker(
            "run", "--detach", "--name", name, "--hostname", template.name, "--label", LABEL, "--network",
            self._network, *aliases, "--memory", SANDBOX_MEMORY, "--read-only", "--cap-drop", "ALL", "--user", "1000",
            self._image, "sleep", "infinity",
        )  # fmt: skip
        network = f'{{{{(index .NetworkSettings.Networks "{self._network}").IPAddress}}}}'
        pod = Pod(name, template, self._docker("inspect", "--format", network, name), self._volumes / name)
        self.pods.append(pod)
        for container in [*template.spec.get("initContainers", []), *template.spec["containers"]]:
            self._start(pod, container)
        return pod

    def _start(self, pod: Pod, container: dict[str, Any]) -> None:
        template, name = pod.template, container["name"]
        env = self._manifests.container_env(container) | template.env.get(name, {})
        main = name == template.main
        memory = MEMORY[template.component] if main else container["resources"]["limits"]["memory"].removesuffix("i")
        command = template.commands.get(name) or [*container.get("command", []), *container.get("args", [])]
        self._docker(
            "run", "--detach", "--name", f"{pod.name}-{name}", "--label", LABEL, "--network", f"container:{pod.name}",
            "--memory", memory, "--memory-swap", memory, *rights(template.spec, container),
            *self._mounts(pod, container), *(option for key in env for option in ("--env", key)),
            self._image, *command, env=env,
        )  # fmt: skip

    def _mounts(self, pod: Pod, container: dict[str, Any]) -> list[str]:
        volumes = {volume["name"]: volume for volume in pod.template.spec.get("volumes", [])}
        options = []
        for mount in container.get("volumeMounts", []):
            volume = volumes.get(mount["name"], {})
            if volume.get("emptyDir", {}).get("medium") == "Memory":
                if mount["mountPath"] != "/dev/shm":
                    raise ValueError(f"{pod.template.name}: a volume in memory at {mount['mountPath']}")
                options += ["--shm-size", SHM]
                continue
            # Of the volumes that are not named there, the pod has a claim.
            path = (pod.folder if volume else self._volumes / "claims" / pod.template.name) / mount["name"]
            path.mkdir(parents=True, exist_ok=True)
            if "configMap" in volume:
                for name, text in self._manifests.config_map(volume["configMap"]["name"]).items():
                    (path / name).write_text(text)
            group = pod.template.spec["securityContext"]["fsGroup"]
            os.chown(path, 0, group)
            path.chmod(0o2775)
            options += ["--volume", f"{path}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}"]
        return options

    def tend(self) -> None:
        """Restart what has ended and should run; finish what is being deleted."""
        for pod in list(self.pods):
            for name, code in self._ended(pod):
                if pod.leaving is None and self._runs_always(pod, name):
                    pod.restarts += name == pod.template.main
                    self._docker("start", f"{pod.name}-{name}")
                else:
                    pod.ended[name] = code
            if pod.leaving is not None and pod.leaving.poll() is not None:
                self._remove(pod)

    def _runs_always(self, pod: Pod, name: str) -> bool:
        own = {c["name"]: c.get("restartPolicy") for c in pod.template.spec.get("initContainers", [])}
        return (own.get(name) or pod.template.spec.get("restartPolicy", "Always")) == "Always"

    def _ended(self, pod: Pod) -> list[tuple[str, int]]:
        """Containers of a pod that have ended since the last look, with their exit codes."""
        inspected = json.loads(self._docker("inspect", *self._names(pod)))
        states = {item["Name"].removeprefix(f"/{pod.name}-"): item["State"] for item in inspected}
        return [(name, state["ExitCode"]) for name, state in states.items()
                if state["Status"] in ("exited", "dead") and name not in pod.ended]  # fmt: skip

    def _names(self, pod: Pod) -> list[str]:
        spec = pod.template.spec
        return [f"{pod.name}-{item['name']}" for item in [*spec.get("initContainers", []), *spec["containers"]]]

    def delete(self, pod: Pod) -> None:
        """Begin to delete a pod: SIGTERM, and SIGKILL after its grace period."""
        grace = pod.template.spec.get("terminationGracePeriodSeconds", 30)
        pod.leaving = self._docker.start("stop", "--time", str(grace), pod.main)

    def _remove(self, pod: Pod) -> None:
        """Remove what is left of a pod; its containers' logs stay."""
        for name in self._names(pod):
            with (self.logs / f"{name}.log").open("wb") as log, contextlib.suppress(subprocess.TimeoutExpired):
                self._docker.start("logs", name, output=Path(log.name)).wait(30)
        self._docker("rm", "--force", "--volumes", *reversed(self._names(pod)), pod.name)
        self.pods.remove(pod)
        shutil.rmtree(pod.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove all pods at once, and the claims."""
        for pod in list(self.pods):
            if pod.leaving is not None:
                pod.leaving.kill()
                pod.leaving.wait()
            self._remove(pod)
        shutil.rmtree(self._volumes, ignore_errors=True)


def rights(pod: dict[str, Any], container: dict[str, Any]) -> list[str]:
    """A container's security settings in Docker's words; its seccomp profile is the same default."""
    user, own = pod["securityContext"], container["securityContext"]
    options = ["--user", f"{user['runAsUser']}:{user['runAsGroup']}"]
    options += [option for name in own["capabilities"]["drop"] for option in ("--cap-drop", name)]
    options += ["--read-only"] if own["readOnlyRootFilesystem"] else []
    return options + ([] if own["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"])
