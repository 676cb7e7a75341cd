"""What is made of the failure of a worker group. Real failures are in test_job_faults.py and test_chaos_run.py.

Run: pytest tests/test_failures.py
"""

import pytest
import ray.exceptions
import torch

from autopainter.errors import StorageError, UserError
from job import failures

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40123"
DEATH = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tpid: 26599
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was \
killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed \
unexpectedly due to SIGSEGV or another unexpected error."""


class GroupError(Exception):
    """As Ray Train's, with the failures of its workers."""

    def __init__(self, *workers: BaseException) -> None:
        super().__init__("the group failed")
        self.worker_failures = dict(enumerate(workers))


@pytest.mark.parametrize(
    ("workers", "kind"),
    [
        ([ValueError("wrong")], "error"),
        ([ray.exceptions.RayActorError()], "killed"),
        ([RuntimeError(GLOO)], "killed"),  # the one that is gone is not missed yet
        ([RuntimeError(f"Traceback\n  File\n{GLOO}"), RuntimeError(GLOO)], "killed"),
        ([ValueError("wrong"), RuntimeError(GLOO)], "error"),  # and the other one only heard of it
        ([StorageError("s3://x: Connection reset by peer"), RuntimeError(GLOO)], "storage"),
        ([torch.OutOfMemoryError("CUDA out of memory"), ray.exceptions.RayActorError()], "gpu memory"),
        ([RuntimeError("Timed out waiting 300000ms")], "hang"),
    ],
)
def test_the_most_telling_cause_is_the_kind(workers, kind):
    failure = failures.explain(GroupError(*workers))
    assert failure.kind == kind
    assert failure.text.startswith("worker 0: ")
    assert failure.text.count("worker ") == len(workers)
    assert "\n" not in failure.text


def test_a_death_is_told_without_what_else_may_kill_a_process():
    failure = failures.explain(GroupError(RuntimeError(GLOO), ray.exceptions.RayActorError(error_msg=DEATH)))
    assert failure.text.endswith(
        "; worker 1: its process was killed or crashed (SYSTEM_ERROR: Worker unexpectedly exits with a connection error"
        " code 2. End of file.)"
    )


def test_what_the_user_must_mend_is_final():
    wrong = UserError("data.manifest: gone")
    assert failures.final(GroupError(RuntimeError(GLOO), wrong)) is wrong
    assert failures.final(GroupError(RuntimeError(GLOO))) is None
