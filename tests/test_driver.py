"""When the driver gives up, with groups of workers that only fail; real groups are in test_job.py and others.

Run: pytest tests/test_driver.py
"""

import threading

import pytest

from autopainter.config import Config
from autopainter.errors import StorageError
from autopainter.storage import LocalStore, StoredObject
from job import driver


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
