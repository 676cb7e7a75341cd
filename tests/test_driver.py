"""When the driver gives up, and what it shows, without workers. Real groups are in test_job.py and test_job_faults.py.

Run: pytest tests/test_driver.py
"""

import threading
from types import SimpleNamespace

import pytest
import ray.exceptions

from autopainter.config import Config
from autopainter.errors import StorageError
from autopainter.storage import LocalStore, StoredObject
from job import driver, group


class Flaky(LocalStore):
    """A folder whose checkpoints can be listed now and then."""

    away = False

    def list(self, prefix: str = "") -> list[StoredObject]:
        if self.away and prefix == "checkpoints/":
            raise StorageError("storage is away")
        return super().list(prefix)


@pytest.fixture
def config(small: Config) -> Config:
    return small.model_copy(update={"cluster": small.cluster.model_copy(update={"max_failures": 3})})


@pytest.mark.parametrize("flaps", [False, True])
def test_failures_without_progress_end_the_run_whatever_storage_tells(
    config: Config, folder: LocalStore, monkeypatch: pytest.MonkeyPatch, flaps: bool
) -> None:
    monkeypatch.setattr(driver, "_FIRST_WAIT_SECONDS", 0.0)
    store, stop, groups = Flaky(folder.uri), threading.Event(), []

    def fail() -> str:
        store.away = flaps and not store.away
        groups.append("failed")
        if len(groups) > 20:
            stop.set()
        raise OSError("the group failed")

    assert driver._supervise(config, store, stop, fail) == 1
    assert len(groups) == 4


def test_a_new_checkpoint_lets_the_run_fail_as_often_again(
    config: Config, folder: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_FIRST_WAIT_SECONDS", 0.0)
    groups: list[str] = []

    def fail() -> str:
        groups.append("failed")
        if len(groups) == 3:
            folder.write("checkpoints/00000007.json", b"")
        raise OSError("the group failed")

    assert driver._supervise(config, folder, threading.Event(), fail) == 1
    assert len(groups) == 3 + 4


class Away(LocalStore):
    """A folder that answers nothing."""

    def list(self, prefix: str = "") -> list[StoredObject]:
        raise StorageError("storage is away")

    def create(self, key: str, data: bytes) -> bool:
        raise StorageError("storage is away")


@pytest.mark.parametrize(
    "error", [ray.exceptions.WorkerCrashedError(), ray.exceptions.OutOfMemoryError("killed by the memory monitor")]
)
def test_a_failure_while_storage_is_away_is_followed_by_another_start(
    config: Config, folder: LocalStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(driver, "_FIRST_WAIT_SECONDS", 0.0)
    groups: list[str] = []

    def fail_once() -> str:
        groups.append("started")
        if len(groups) == 1:
            raise error
        return "finished"

    assert driver._supervise(config, Away(folder.uri), threading.Event(), fail_once) == 0
    assert len(groups) == 2


@pytest.mark.parametrize(
    ("there", "wanted", "used"),
    [(8, None, True), (7, None, True), (1, None, True), (0, None, False), (0, True, True), (8, False, False)],
)
def test_a_run_that_began_on_gpus_stays_on_them(
    config: Config, folder: LocalStore, monkeypatch: pytest.MonkeyPatch, there: int, wanted: bool | None, used: bool
) -> None:
    """Groups are started while all GPUs of the cluster are gone and when they have come back."""
    now = {"GPU": float(there)}
    groups: list[bool | None] = []

    def start(config: Config, gpus: bool, *_: object) -> str:
        groups.append(group._trainer(config, gpus, {}, str(folder.root)).scaling_config.use_gpu)
        now["GPU"] = 0.0 if len(groups) == 1 else 16.0
        if len(groups) < 3:
            raise ray.exceptions.WorkerCrashedError
        return "finished"

    monkeypatch.setattr(ray, "cluster_resources", lambda: now)
    monkeypatch.setattr(driver, "_FIRST_WAIT_SECONDS", 0.0)
    for of, name in ((driver, "forward_as"), (driver, "log_as"), (driver.cluster, "connect")):
        monkeypatch.setattr(of, name, lambda *_: None)
    monkeypatch.setattr(group, "run", start)
    cluster = config.cluster.model_copy(update={"workers": 8, "gpus": wanted})
    place = config.run.model_copy(update={"storage": str(folder.root)})
    assert driver.run(config.model_copy(update={"cluster": cluster, "run": place})) == 0
    assert groups == [used] * 3


class NoWait(threading.Event):
    """An event that nobody waits for."""

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set()


class Forgetful(LocalStore):
    """A folder that keeps no journal: each entry would be synced to the disk."""

    def create(self, key: str, data: bytes) -> bool:
        return True


def test_any_number_of_failures_in_a_row_is_allowed(config: Config, folder: LocalStore) -> None:
    groups: list[str] = []

    def fail() -> str:
        groups.append("failed")
        raise OSError("the group failed")

    cluster = config.cluster.model_copy(update={"max_failures": 1100})
    assert driver._supervise(config.model_copy(update={"cluster": cluster}), Forgetful(folder.uri), NoWait(), fail) == 1
    assert len(groups) == 1101


def test_progress_that_comes_late_is_shown_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    told, late, shown = [1, 2], [True, False, True, False], []

    def ask() -> list[int]:  # as DriverLink.told, which forgets what it has said
        said = told.copy()
        told.clear()
        return said

    def get(answer: list[int], timeout: float) -> list[int]:
        if late and late.pop(0):
            raise ray.exceptions.GetTimeoutError
        return answer

    monkeypatch.setattr(group.ray, "get", get)
    progress = group._Progress(SimpleNamespace(told=SimpleNamespace(remote=ask)), shown.append)
    progress.look(0.1)
    told += [3]
    for _ in range(2):
        progress.look(0.1)
    told += [4]
    progress.finish()
    assert shown == [1, 2, 3, 4]
