"""The cluster of ``cluster_e2e.py`` and the runs in it: what is started, awaited and checked."""

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos_checks import bits, final_state, scalars
from chaos_watch import Failed
from e2e_docker import Docker
from e2e_manifests import Manifests
from e2e_operator import RayCluster, Submission
from e2e_pods import Kubelet, Pod
from e2e_views import Attempt, Prometheus, RunLog, get_json, tensorboard_steps
from processes import child_env
from services import SeaweedFS

from autopainter import storage

REFERENCE = "undisturbed"
PACK = "python job/pack.py openmoji s3://datasets/cartoons --size 48"
BUCKETS = ("datasets", "autopainter")
WORKERS = 2
WAIT_SECONDS = 420.0
"""Whatever is waited for has failed if it takes longer."""
RUN_SECONDS = 2400.0
TICK_SECONDS = 0.25
CURVE = "generator/loss"
_RIGHTS = """
import os, pathlib
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/1/status").read_text().splitlines())
assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"1000"}, status["Uid"]
assert all(int(status[name], 16) == 0 for name in ("CapEff", "CapPrm", "CapBnd")), "capabilities"
assert status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2", "privileges"
assert os.statvfs("/").f_flag & os.ST_RDONLY, "the root file system can be written"
"""

log = logging.getLogger(__name__)


class PodStorage(SeaweedFS):
    """The S3 server of a pod, in the eyes of this process; it is not started here."""

    def at(self, url: str) -> None:
        """Set its address."""
        self.endpoint = self.env["AWS_ENDPOINT_URL"] = url

    def answers(self) -> bool:
        """Whether it can be written and read."""
        try:
            self._probe()
        except Exception as error:  # whatever a server that is half up answers
            log.debug("storage: not yet: %s", error)
            return False
        return True


class Scenario:
    """The cluster, and what is done in it.

    Attributes:
        cluster, submission: the Ray cluster and the job in it, once there is one.
        runlog: what the log of the newest training job has said.
        facts: what was found to hold, and the words for it.
    """

    cluster: RayCluster
    submission: Submission
    prometheus: Prometheus
    board: Pod

    def __init__(self, docker: Docker, image: str, folder: Path, steps: int) -> None:
        self.docker, self.image, self.folder, self.steps = docker, image, folder, steps
        self.server = PodStorage(folder, buckets=BUCKETS)
        keys = {name: self.server.env[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        secret = {"autopainter-s3": keys, "autopainter-ray-token": {"auth_token": secrets.token_hex(32)}}
        self.manifests = Manifests(secret, steps)
        self.job = self.manifests.get("RayJob", "autopainter")
        self.network = f"ap-e2e-{secrets.token_hex(3)}"
        self.kubelet = Kubelet(docker, self.network, image, folder, self.manifests)
        self.runlog = RunLog(REFERENCE)
        self.facts: list[tuple[str, str]] = []
        self._tended: list[Callable[[], None]] = [self.kubelet.tend]

    @contextlib.contextmanager
    def pods(self) -> Iterator[None]:
        """Storage, TensorBoard, Prometheus and the Ray cluster, up; nothing is left afterwards."""
        with contextlib.ExitStack() as stack:
            self.docker("network", "create", "--internal", self.network)
            stack.callback(self.docker, "network", "rm", self.network)
            stack.callback(self.kubelet.close)
            pod = self.kubelet.start(self.manifests.workload("StatefulSet", "autopainter-storage"))
            self.server.at(f"http://{pod.ip}:8333")
            os.environ.update(self.server.env)
            self.until(self.server.answers, "storage")
            self.board = self.kubelet.start(self.manifests.workload("Deployment", "autopainter-tensorboard"))
            self.prometheus = stack.enter_context(Prometheus(self.manifests, self.folder / "prometheus"))
            self._tended.append(lambda: self.prometheus.show(self.kubelet.pods))
            self.cluster = RayCluster(self.kubelet, self.manifests, self.job)
            self.cluster.start_head()
            self._tended.append(self.cluster.tend)
            self.until(lambda: self.cluster.alive() == 1 + WORKERS, "the nodes of the Ray cluster")
            yield

    # -- waiting

    def until(self, condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
        """Wait for a condition, and do what a cluster does all the time; ``Failed`` if it takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Failed(f"{what}: not within {seconds:.0f} s")
            for tend in self._tended:
                tend()
            time.sleep(TICK_SECONDS)

    # -- jobs

    @contextlib.contextmanager
    def job_of(self, what: str, entrypoint: str = "") -> Iterator[None]:
        """Submit a job as the RayJob's submitter does, and wait for its end, which must be a success.

        Args:
            entrypoint: instead of the RayJob's.
        """
        self.submission = Submission(self.kubelet, self.docker, self.cluster, self.job, entrypoint)
        self._tended.append(self._follow)
        try:
            yield
            self.until(lambda: self.submission.finished, f"the end of {what}", RUN_SECONDS)
            if (status := self.cluster.status(self.submission.id)) != "SUCCEEDED":
                raise Failed(f"{what}: the job ended as {status}")
        except Failed as error:
            raise Failed(f"{error}; the end of the job's log:\n{self.submission.tail()}") from None
        finally:
            self._tended.remove(self._follow)

    def _follow(self) -> None:
        self.runlog.feed(self.submission.tend())
        if self.submission.given_up:
            raise Failed(f"the submitter has given up: exit codes {self.submission.codes}")

    def prepare(self) -> None:
        """The weights of the feature loss, from this process as no pod may leave its network; then the data set."""
        weights = self.manifests.settings["loss"]["vgg_weights"]
        command = [str(Path(sys.executable).parent / "autopainter"), "vgg", "--output", weights]
        done = subprocess.run(command, env=child_env(self.server.env), text=True, capture_output=True)
        if done.returncode:
            raise Failed(f"autopainter vgg: {done.stderr.strip()[-500:]}")
        with self.job_of("packing", PACK):
            pass

    def undisturbed(self) -> None:
        """The run that the other one is compared with, on the same cluster."""
        with self.job_of("the undisturbed run", f"{self.job['spec']['entrypoint']} --set run.name={REFERENCE}"):
            pass
        if len(self.runlog.attempts) != 1:
            raise Failed(f"the undisturbed run was disturbed: it took {len(self.runlog.attempts)} starts")

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """The RayJob's run, from its first step to its end."""
        self.runlog = RunLog(self.manifests.run)
        with self.job_of("the run"):
            self.until(lambda: bool(self.runlog.attempts), "the first start of the run")
            yield

    @property
    def current(self) -> Attempt:
        """The start of the run that was seen last."""
        return self.runlog.attempts[-1]

    @property
    def run(self) -> storage.Store:
        """Where the RayJob's run is."""
        return self._stored(self.manifests.run)

    def _stored(self, run: str) -> storage.Store:
        return storage.open_store(f"{self.manifests.settings['run']['storage']}/{run}")

    # -- what must hold

    def check_cluster(self) -> None:
        """Rights of the containers, and what strangers are refused."""
        for pod in self.kubelet.pods:
            done = self.docker.try_("exec", pod.main, "python3", "-c", _RIGHTS)
            if done.returncode:
                raise Failed(f"{pod.main}: {done.stderr.strip()[-300:]}")
        self.facts.append(("containers", "uid 1000, no capabilities, no new privileges, seccomp, read-only root"))
        if not self.cluster.refuses_strangers():
            raise Failed("the dashboard answers without the token")
        self.facts.append(("dashboard without the token", "401; with a wrong one 403"))
        # Ray's client server cannot be turned off; a network policy hides it, and this network has none.
        client = ("python3", "-c", f"import ray; ray.init('ray://{self.cluster.head.ip}:10001')")
        stranger = ("env", "--unset=RAY_AUTH_TOKEN", "RAY_AUTH_MODE=disabled")
        worker = self.cluster.workers[0].main
        if self.docker.try_("exec", worker, *stranger, *client).returncode == 0:
            raise Failed("Ray's client port takes strangers")
        # Else the lines above say nothing. Ray gives up on a client's server that takes long to start.
        self.until(
            lambda: self.docker.try_("exec", worker, *client).returncode == 0, "Ray's client, with the token", 180
        )
        self.facts.append(("Ray's client port", "open with the token only"))

    def check_end(self) -> None:
        """The run against the undisturbed one, and what the tools show of it."""
        run, steps = self.manifests.run, self.steps
        states, curves = [], []
        for name in (run, REFERENCE):
            stored = self._stored(name)
            states.append({key: bits(tensor) for key, tensor in final_state(stored, steps).items()})
            curves.append(scalars(stored, self.folder / "curves" / name))
        if states[0] != states[1]:
            differing = sorted(key for key in states[0].keys() | states[1] if states[0].get(key) != states[1].get(key))
            raise Failed(f"{len(differing)} tensors differ from the undisturbed run's: {differing[:3]}")
        if curves[0] != curves[1] or [step for step, _ in curves[0][CURVE]] != list(range(1, steps + 1)):
            raise Failed("the curves are not those of the undisturbed run, each step once")
        self.facts.append(("final state", f"{len(states[0])} tensors and {len(curves[0])} curves of {steps} steps equal"
                           " those of the undisturbed run, bit for bit"))  # fmt: skip
        ask = self.prometheus.query
        step = f'max(autopainter_step{{run="{run}"}})'
        self.until(lambda: [value for _, value in ask(step)] == [steps], f"{step} of {steps} in Prometheus", 60)
        images = max(value for _, value in ask(f'autopainter_images_total{{run="{run}"}}'))
        stops = sum(value for _, value in ask(f'max by (kind) (autopainter_stops_total{{run="{run}"}})'))
        up = len(ask("up == 1"))
        ours, rays = (len(ask(f'count by (__name__) ({{__name__=~"{name}_.+"}})')) for name in ("autopainter", "ray"))
        self.facts.append(("Prometheus", f"{up} endpoints up, {ours} of our metrics and {rays} of Ray's; of {run}: step"
                           f" {steps}, {images:.0f} images, {stops:.0f} stops"))  # fmt: skip
        url = f"http://{self.board.ip}:6006"
        self.until(lambda: tensorboard_steps(url, run, CURVE)[-1:] == [steps], "TensorBoard: the last step", 120)
        version = get_json(f"{url}/data/environment")["version"]
        points = tensorboard_steps(url, run, CURVE)
        self.facts.append((f"TensorBoard {version}", f"{CURVE}: {len(points)} points, the last {steps}"))
