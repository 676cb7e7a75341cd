"""Docker for ``cluster_e2e.py``: the client, an engine of its own where none runs, the base image and the image."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from processes import Service, ServiceError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("python3", "python3-venv", "ca-certificates")
"""What the base image has beside Debian's least."""
SUITE, BASE = "bookworm", "auto-painter-base:bookworm"
_BUILD_SECONDS = 1800.0
_COMMAND_SECONDS = 300.0


class Docker:
    """The client's commands.

    Args:
        host: of the engine, such as ``unix:///run/docker.sock``; none: the client's own choice.
    """

    def __init__(self, host: str | None = None) -> None:
        self.program = os.environ.get("DOCKER", "docker")
        self.env = {**os.environ, **({"DOCKER_HOST": host} if host else {})}

    def __call__(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """Run a command; its output. ``ServiceError`` with its complaint if it fails."""
        done = self.try_(*arguments, env=env)
        if done.returncode:
            raise ServiceError(f"docker {' '.join(arguments[:3])}: {done.stderr.strip()[-500:]}")
        return done.stdout.strip()

    def try_(self, *arguments: str, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        """Run a command that may fail."""
        return subprocess.run(
            [self.program, *arguments], env={**self.env, **(env or {})}, text=True, capture_output=True,
            timeout=_COMMAND_SECONDS,
        )  # fmt: skip

    def start(self, *arguments: str, output: Path | None = None) -> "subprocess.Popen[bytes]":
        """Start a command that takes long; its output goes to a file."""
        with open(output or os.devnull, "wb") as file:  # noqa: PTH123  # the null device is no file of ours
            return subprocess.Popen([self.program, *arguments], env=self.env, stdout=file, stderr=subprocess.STDOUT)

    def answers(self) -> bool:
        """Whether there is an engine."""
        try:
            return self.try_("version").returncode == 0
        except FileNotFoundError:
            return False

    def has_image(self, name: str) -> bool:
        """Whether an image is there."""
        return self.try_("image", "inspect", name).returncode == 0


class Engine(Service):
    """A Docker engine without a bridge of its own, whose firewall rules go with it; it builds on the host's network."""

    kind = "dockerd"
    stop_seconds = 90.0

    def __init__(self) -> None:
        super().__init__(detach=False)
        self._rules = b""

    def _finish(self, grace: float) -> None:
        super()._finish(grace)
        if self._rules:
            subprocess.run(["iptables-restore"], input=self._rules, check=True)
            self._rules = b""

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        if Path("/sys/class/net/docker0").exists():  # an engine without a bridge removes that of others
            raise ServiceError(
                "the bridge docker0 of another Docker engine is here, but none answers: start it or name it with "
                "DOCKER_HOST; if it is gone for good, 'ip link delete docker0' removes what it left"
            )
        self._rules = subprocess.run(["iptables-save"], check=True, capture_output=True).stdout
        folder = self._scratch()
        self.host = f"unix://{folder}/docker.sock"
        command = ["dockerd", f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--host={self.host}"]
        command += [f"--pidfile={folder}/pid", "--bridge=none", "--ip-forward=false"]
        return command, {}, folder / "dockerd.log"

    def _probe(self) -> None:
        Docker(self.host)("version")


def make_base(docker: Docker, folder: Path) -> None:
    """A plain Debian with Python, from its package archive: no image registry is needed."""
    if docker.has_image(BASE):
        return
    if missing := [program for program in ("debootstrap", "tar") if shutil.which(program) is None]:
        raise ServiceError(f"{missing[0]} is not installed; name an image with --base instead")
    root = folder / "base"
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root)]
    with (folder / "debootstrap.log").open("wb") as log:
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise ServiceError(f"debootstrap failed, see {log.name}")
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(
            [docker.program, "import", "-", BASE], env=docker.env, stdin=tar.stdout, check=True, capture_output=True
        )
    shutil.rmtree(root)


def build(docker: Docker, tag: str, base: str, log: Path) -> None:
    """Build the image by scripts/image.sh, which also tries it."""
    command = ["bash", str(ROOT / "scripts/image.sh"), "--tag", tag, "--base", base, "--network", "host"]
    with log.open("wb") as output:
        code = subprocess.run(
            command, env={**docker.env, "DOCKER": docker.program}, stdout=output, stderr=subprocess.STDOUT,
            timeout=_BUILD_SECONDS,
        ).returncode  # fmt: skip
    if code:
        raise ServiceError(f"scripts/image.sh failed:\n{log.read_text(errors='replace')[-2000:]}")
