"""What KubeRay makes of a RayJob, for ``cluster_e2e.py``: its Ray cluster, and the submitter that tries again.

The commands and variables are those that KubeRay 1.7 writes into its pods (ray-operator/controllers/ray/common).
"""

import copy
import json
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import yaml
from e2e_docker import Docker
from e2e_manifests import OBJECT_STORE_BYTES, Manifests, Template
from e2e_pods import Kubelet, Pod

_GCS, _DASHBOARD, _AGENT, _METRICS = "6379", "8265", "52365", "8080"
_HEALTH = (
    'python3 -c "import sys, urllib.request as r; '
    "sys.exit(b'success' not in r.urlopen('{url}/api/gcs_healthz', timeout=5).read())\""
)
_FORWARD_SECONDS = 5.0
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our network


class RayCluster:
    """The head and the workers of a RayJob, and a new pod for each worker that is gone.

    Args:
        job: the RayJob's manifest.
    """

    def __init__(self, kubelet: Kubelet, manifests: Manifests, job: dict[str, Any]) -> None:
        self._kubelet, self._job, self._spec = kubelet, job, job["spec"]["rayClusterSpec"]
        name = f"{job['metadata']['name']}-{uuid.uuid4().hex[:5]}"
        service = f"{name}-head-svc.{job['metadata']['namespace']}.svc.cluster.local"
        self.token = manifests.secrets[self._spec["authOptions"]["secretName"]]["auth_token"]
        self.auth = {"RAY_AUTH_MODE": self._spec["authOptions"]["mode"], "RAY_AUTH_TOKEN": self.token}
        self._common = {"RAY_CLUSTER_NAME": name, "RAY_PORT": _GCS, "RAY_USAGE_STATS_KUBERAY_IN_USE": "1", **self.auth}
        self.dashboard = f"http://{service}:{_DASHBOARD}"
        head, group = self._spec["headGroupSpec"], self._spec["workerGroupSpecs"][0]
        self._head = self._template(head, f"{name}-head", f"127.0.0.1:{_GCS}", "--head", service)
        self._worker = self._template(group, f"{name}-{group['groupName']}-worker", f"{service}:{_GCS}")
        self._replicas = int(group["replicas"])
        self.workers: list[Pod] = []

    def _template(self, group: dict[str, Any], name: str, address: str, *options: str) -> Template:
        """The pod of a group, with its ``ray start``."""
        service = options[1:]
        options = options[:1]
        pod = copy.deepcopy(group["template"])
        parameters = {"dashboard-agent-listen-port": _AGENT, "metrics-export-port": _METRICS, **group["rayStartParams"]}
        parameters |= {"dashboard-host": "0.0.0.0"} if options else {"address": address, "num-cpus": "1"}
        parameters["object-store-memory"] = str(OBJECT_STORE_BYTES)
        flags = " ".join(f"--{key}={parameters[key]}" for key in sorted(parameters))
        start = f"ulimit -n 65536; ray start {' '.join(options)} --block {flags}"
        template = Template(name, pod["spec"], pod["metadata"]["labels"], hosts=service)
        template.commands[template.main] = ["/bin/bash", "-c", "--", start]
        template.env[template.main] = {**self._common, "RAY_ADDRESS": address, "KUBERAY_GEN_RAY_START_CMD": start}
        return template

    def start_head(self) -> None:
        """Start the head; workers come when it ``answers()``, as their wait-gcs-ready container sees to."""
        self.head = self._kubelet.start(self._head)

    def tend(self) -> None:
        """Replace workers that have ended, once they are gone."""
        for pod in [pod for pod in self.workers if pod.exit_code is not None and pod.leaving is None]:
            self._kubelet.delete(pod)
        self.workers = [pod for pod in self.workers if pod in self._kubelet.pods]
        if len(self.workers) < self._replicas and self.answers():
            self.workers.append(self._kubelet.start(self._worker))

    def answers(self) -> bool:
        """Whether the head's global control store is healthy."""
        try:
            return b"success" in self._get("/api/gcs_healthz", {})
        except OSError:
            return False

    def status(self, submission: str) -> str:
        """Ray's word for the state of a job, such as SUCCEEDED."""
        info = json.loads(self._get(f"/api/jobs/{submission}", {"Authorization": f"Bearer {self.token}"}))
        return str(info["status"])

    def alive(self) -> int:
        """Number of nodes that are up and not being drained, the head among them; 0 if that does not answer."""
        try:
            answer = json.loads(self._get("/nodes?view=summary", {"Authorization": f"Bearer {self.token}"}))
        except OSError:
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in answer["data"]["summary"])

    def refuses_strangers(self) -> bool:
        """Whether the dashboard's interface wants the token."""
        codes = []
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            try:
                self._get("/api/jobs/", headers)
            except urllib.error.HTTPError as error:
                codes.append(error.code)
        return codes == [401, 403]

    def _get(self, path: str, headers: dict[str, str]) -> bytes:
        request = urllib.request.Request(f"http://{self.head.ip}:{_DASHBOARD}{path}", headers=headers)
        with _http.open(request, timeout=_FORWARD_SECONDS) as answer:
            body: bytes = answer.read()
        return body


class Submission:
    """A RayJob's submitter: pods that submit the same id until one has followed the job to its end.

    Args:
        entrypoint: instead of the RayJob's.
    """

    def __init__(
        self, kubelet: Kubelet, docker: Docker, cluster: RayCluster, job: dict[str, Any], entrypoint: str = ""
    ) -> None:
        self._kubelet, self._docker, self._cluster = kubelet, docker, cluster
        self.id = f"{job['metadata']['name']}-{uuid.uuid4().hex[:5]}"
        self._tries = 1 + int(job["spec"]["submitterConfig"]["backoffLimit"])
        pod = copy.deepcopy(job["spec"]["submitterPodTemplate"])
        self._template = Template(f"{self.id}-submitter", pod["spec"], pod["metadata"]["labels"])
        environment = json.dumps(yaml.safe_load(job["spec"].get("runtimeEnvYAML", "{}")))
        command = _submit(cluster.dashboard, self.id, entrypoint or job["spec"]["entrypoint"], environment)
        self._template.commands[self._template.main] = ["/bin/bash", "-ce", "--", command]
        self._template.env[self._template.main] = {
            **cluster.auth, "RAY_DASHBOARD_ADDRESS": cluster.dashboard, "RAY_JOB_SUBMISSION_ID": self.id,
        }  # fmt: skip
        self.codes: list[int] = []
        self._next()

    @property
    def finished(self) -> bool:
        """Whether a submitter has come to the job's end."""
        return self.codes[-1:] == [0]

    @property
    def given_up(self) -> bool:
        """Whether as many have failed as the RayJob allows."""
        return len(self.codes) >= self._tries and not self.finished

    def _next(self) -> None:
        self._pod = self._kubelet.start(self._template)
        self.log = self._kubelet.logs / f"{self.id}-{len(self.codes) + 1}.log"
        self._follow = self._docker.start("logs", "--follow", self._pod.main, output=self.log)
        self._read = 0

    def tend(self) -> list[str]:
        """Start the next pod if this one has failed; what the job has said since the last call, in whole lines."""
        over = self._pod.exit_code is not None and self._follow.poll() is not None
        data = self.log.read_bytes()[self._read :]
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        if over and self._pod in self._kubelet.pods and self._pod.leaving is None:
            assert self._pod.exit_code is not None
            self.codes.append(self._pod.exit_code)
            self._kubelet.delete(self._pod)
            if not self.finished and not self.given_up:
                self._next()
        return whole.decode(errors="replace").splitlines()

    def tail(self) -> str:
        """The end of what the job has said."""
        return "\n".join(Path(self.log).read_text(errors="replace").splitlines()[-25:])


def _submit(dashboard: str, submission: str, entrypoint: str, environment: str) -> str:
    """What a submitter runs: it submits only if the cluster does not know the job, and follows it."""
    health = _HEALTH.format(url=dashboard)
    return (
        f'until {health} >/dev/null 2>&1 ; do echo "Waiting for Ray Dashboard GCS to become healthy at {dashboard} ..."'
        f" ; sleep 2 ; done ; if ! ray job status --address {dashboard} {submission} >/dev/null 2>&1 ; then ray job"
        f" submit --address {dashboard} --no-wait --runtime-env-json {json.dumps(environment)}"
        f" --submission-id {submission} -- {entrypoint} ; fi ; ray job logs --address {dashboard} --follow {submission}"
    )
