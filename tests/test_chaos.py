"""The stream through a proxy that breaks answers: the right data or a clear error, nothing else.

Random trials of ``scripts/chaos_stream.py``, and each kind of fault by itself. Run: pytest tests/test_chaos.py
"""

import itertools
import re
import subprocess
import sys
import threading
import urllib.parse

import pytest
from conftest import ROOT
from faulty_proxy import FAULTS, FaultyProxy
from storage_times import storage_times
from waiting import PATIENCE_SECONDS

from autopainter import storage
from autopainter.data import manifest
from autopainter.data.stream import TrainingStream
from autopainter.errors import CorruptData, StorageError
from autopainter.storage.s3 import shared_client

STEPS = 12  # over the end of an epoch of the data set


@pytest.fixture
def proxy(s3):
    """A proxy without faults that this process's storage is read through."""
    with pytest.MonkeyPatch.context() as patch, FaultyProxy(s3.endpoint) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        shared_client.cache_clear()
        yield proxy
    shared_client.cache_clear()


SILENT = ("stall", "trickle")


def silence_of(fault):
    """What to take for a fault: a second of silence, if that is the fault; a starved server is none."""
    return 1 if fault in SILENT else None


def keys_and_pixels(data, config):
    """What a worker gets, as values to compare."""
    others = set(threading.enumerate())
    stream = TrainingStream(data, config, 0, 1, 0)
    try:
        return [(batch.step, batch.keys, batch.color.tolist(), batch.sketch.tolist(), batch.hint.tolist())
                for batch in itertools.islice(stream, STEPS)]  # fmt: skip
    finally:
        stream.close()
        for thread in set(threading.enumerate()) - others:
            thread.join()  # it reads ahead, and would go on through the proxy of another test


def test_random_trials_end_in_the_right_data_or_a_clear_error():
    command = [sys.executable, str(ROOT / "scripts/chaos_stream.py"), "--trials", "12", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, stopped = re.search(r"outcomes: (\d+) whole, (\d+) stopped, 0 third, 0 hang", done.stdout).groups()
    assert int(whole) + int(stopped) == 12
    assert int(whole) > 0
    assert int(stopped) > 0
    assert re.search(r"injected: \d+ ", done.stdout)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_changes_nothing(proxy, dataset, small, fault):
    data = manifest.load(dataset)
    expected = keys_and_pixels(data, small)
    proxy.begin({}, script=[fault, fault])
    before = storage.retries()
    with storage_times(timeout_seconds=silence_of(fault)):
        assert keys_and_pixels(data, small) == expected
    assert proxy.injected == {fault: 2}
    again = 0 if fault in ("delay", "flip") else 2  # a flipped byte is seen by the checksum, not by the store
    assert storage.retries() - before == again or (fault in SILENT and storage.retries() - before > again)


def test_a_damaged_shard_is_named(proxy, dataset, small):
    data = manifest.load(dataset)
    shard = data.split("train")[1].key
    uri = f"{dataset.rpartition('/')[0]}/{shard}"
    path = urllib.parse.urlsplit(uri)
    proxy.begin({}, damaged={f"/{path.netloc}{path.path}": 2000})
    with pytest.raises(CorruptData, match=re.escape(f"{uri}: ")):
        keys_and_pixels(data, small)
    assert proxy.injected["damaged"] > 1  # it was fetched again first


@pytest.mark.parametrize("fault", ["503", "stall", "refuse"])
def test_a_server_that_stays_broken_is_named_with_the_shard(proxy, dataset, small, fault):
    data = manifest.load(dataset)
    proxy.begin({fault: 1})
    named = pytest.raises(StorageError, match=rf"{dataset.rpartition('/')[0]}/train-\d+\.tar: \S")
    with storage_times(1, silence_of(fault)), named as caught:
        keys_and_pixels(data, small)
    assert not isinstance(caught.value, CorruptData)
    assert proxy.injected[fault] > 1
