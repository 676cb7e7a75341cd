"""The store: one contract over folders and S3, against real files and a real SeaweedFS (notes/streaming.md A.2).

What a client with other settings meets (credentials, endpoint, a server that is down) is seen in a process of its own,
because a process has one client. Run: pytest tests/test_storage.py
"""

import contextlib
import datetime
import hashlib
import http.server
import ipaddress
import itertools
import logging
import os
import runpy
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from faulty_proxy import FaultyProxy
from processes import HOST, child_env, free_ports
from services import SeaweedFS
from storage_times import storage_times
from waiting import PATIENCE_SECONDS, until

from autopainter import storage
from autopainter.errors import CorruptData, StorageError, UserError
from autopainter.storage import StoredObject, open_store
from autopainter.storage.s3 import MULTIPART_BYTES
from autopainter.uri import split

CHILD = """
import logging, sys
from pathlib import Path
from autopainter import storage
from autopainter.errors import CorruptData, StorageError, UserError
logging.basicConfig(format="%(message)s")
uri, code = sys.argv[1:]
try:
    exec(code, {"store": storage.open_store(uri), "storage": storage, "Path": Path, "uri": uri})
    print("done")
except (OSError, UserError) as error:
    kinds = (UserError, CorruptData, StorageError, FileNotFoundError, OSError)
    print(next(kind.__name__ for kind in kinds if isinstance(error, kind)), error, sep="|")
"""


def start(code, uri, environment, umask=-1):
    """Run ``code`` with a ``store`` of ``uri`` in a process of its own, with these AWS_* settings only."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", CHILD, uri, code],
        env=child_env(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        umask=umask,
    )


def outcome(code, uri, environment, retry_seconds="0.3"):
    """What came of ``start``: ("done", "") or (kind of error, message), and whether it was tried again."""
    process = start(code, uri, {**environment, "AUTOPAINTER_STORAGE_RETRY_SECONDS": retry_seconds})
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, err
    assert out.count("\n") == 1  # each error is one line
    assert environment.get("AWS_SECRET_ACCESS_KEY", "no secret") not in out + err
    kind, _, message = out.strip().partition("|")
    return kind, message, "trying again" in err


def succeeds(code, uri, environment):
    """Whether ``code`` ends without an error."""
    kind, message, _ = outcome(code, uri, environment, retry_seconds="60")
    return kind == "done" or message


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """URI of an empty place."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3_uri")


@pytest.fixture
def store(root):
    return open_store(root)


# The contract


def test_what_is_written_is_read(store):
    for data in (b"", b"one", bytes(range(256)) * 100):
        store.write("folder/key.bin", data)
        assert store.read("folder/key.bin") == data
        assert store.size("folder/key.bin") == len(data)
    assert store.read_range("folder/key.bin", 250, 260) == data[250:260]
    assert store.read_range("folder/key.bin", 0, len(data)) == data
    assert store.list() == [StoredObject("folder/key.bin", 25600)]


def test_what_is_not_there(store):
    store.write("other", b"x")
    with pytest.raises(FileNotFoundError, match="missing/key"):
        store.read("missing/key")
    with pytest.raises(FileNotFoundError, match="missing/key"):
        store.read_range("missing/key", 0, 1)
    assert store.size("missing/key") is None
    assert store.size("oth") is None  # a prefix of a key is no key
    assert store.list("missing/") == []
    store.delete(["missing/key", "other", "missing/other"])
    assert store.list() == []


@pytest.mark.parametrize(("first", "stop"), [(2, 6), (4, 6), (100, 120)])
def test_a_range_past_the_end_is_corrupt_data(store, first, stop):
    """A shard that was cut off; the range may begin inside or outside of what is left of it."""
    store.write("shard.tar", b"0123")
    with pytest.raises(CorruptData, match="shard") as caught:
        store.read_range("shard.tar", first, stop)
    assert str(stop) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_create_keeps_what_is_there(store):
    assert store.create("a/key", b"mine")
    assert store.create("a/key", b"mine")  # as when the answer to the first request was lost
    assert not store.create("a/key", b"other")
    assert not store.create("a/key", b"")
    assert store.read("a/key") == b"mine"
    store.write("a/key", b"replaced")
    assert not store.create("a/key", b"mine")
    store.delete(["a/key"])
    assert store.create("a/key", b"other")


def test_of_many_that_create_at_once_one_wins(store):
    racers = 4 if isinstance(store, storage.S3Store) else 32  # contended creates queue on a lock in weed
    barrier = threading.Barrier(racers)

    def race(number):
        barrier.wait(60)
        return store.create("lock", b"racer %d" % number)

    with ThreadPoolExecutor(racers) as pool:
        won = list(pool.map(race, range(racers)))
    assert won.count(True) == 1
    assert store.read("lock") == b"racer %d" % won.index(True)
    assert store.list() == [StoredObject("lock", len(store.read("lock")))]


def test_lists_are_sorted_and_filtered_by_the_beginning_of_the_key(store):
    keys = ["a/1", "a/10", "a/2/x", "a/2/y", "a.json", "ab/1", "b"]
    for key in keys:
        store.write(key, b"x" * len(key))
    assert store.list() == [StoredObject(key, len(key)) for key in sorted(keys)]
    for prefix in ("a", "a/", "a/1", "a/2/", "ab", "b", "c", "a/2/z"):
        assert [entry.key for entry in store.list(prefix)] == sorted(key for key in keys if key.startswith(prefix))
    store.delete(["a/2/x", "b"])
    assert [entry.key for entry in store.list()] == sorted(set(keys) - {"a/2/x", "b"})


def test_a_store_ends_at_its_prefix(root):
    store, sibling, child = open_store(f"{root}/run"), open_store(f"{root}/run2"), open_store(f"{root}/run/inner/")
    for place in (store, sibling, child):
        place.write("key", place.uri.encode())
    assert [entry.key for entry in store.list()] == ["inner/key", "key"]
    assert [entry.key for entry in sibling.list()] == ["key"]
    assert [entry.key for entry in child.list()] == ["key"]
    assert store.read("inner/key") == child.read("key") == child.uri.encode()
    store.delete(["key"])
    assert sibling.read("key") == sibling.uri.encode()
    assert store.locate("a/b") == f"{root}/run/a/b"


def test_a_thousand_and_more_objects(s3_uri):
    store = open_store(s3_uri)
    keys = [f"many/{number:04d}" for number in range(1003)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.write(key, b"1"), keys))
    store.write("other", b"1")
    assert [entry.key for entry in store.list("many/")] == keys
    store.delete(iter(keys))
    assert [entry.key for entry in store.list()] == ["other"]


def test_a_large_object(s3_uri):
    store = open_store(s3_uri)
    data = os.urandom(MULTIPART_BYTES + 3)
    store.write("large", data)
    assert store.size("large") == len(data)
    assert store.read("large") == data
    part = 8 << 20  # boto3's size of a part
    assert store.read_range("large", part - 5, part + 5) == data[part - 5 : part + 5]


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "s3://", "s3:///prefix"])
def test_other_kinds_of_places_are_refused(uri):
    with pytest.raises(UserError, match="s3://BUCKET/PREFIX") as caught:
        open_store(uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://b/p/x.json", ("s3://b/p", "x.json")),
        ("s3://b/x.json", ("s3://b", "x.json")),
        ("/x.json", ("/", "x.json")),
        ("x.json", (".", "x.json")),
        ("a/b/x.json", ("a/b", "x.json")),
    ],
)
def test_split(uri, parts):
    assert split(uri) == parts


# Folders


def half_files(folder):
    return [name for name in os.listdir(folder) if name != "key"]


@pytest.fixture
def writer(tmp_path):
    """A process that writes the same file again and again, stopped inside a write, and the size of the file."""
    size = 8 << 20
    code = f"for n in range(10**9): store.write('key', b'%d' % (n % 10) * {size}); print(n)"
    process = start(code, str(tmp_path), {})
    try:
        process.stdout.readline()
        while True:
            while not half_files(tmp_path):
                assert process.poll() is None
            os.kill(process.pid, signal.SIGSTOP)
            while "State:\tT" not in Path(f"/proc/{process.pid}/status").read_text():
                pass
            # A file of no bytes may not be locked yet, and is anybody's.
            if any((tmp_path / name).stat().st_size for name in half_files(tmp_path)):
                break
            os.kill(process.pid, signal.SIGCONT)
        yield process, size
    finally:
        process.kill()
        process.communicate()


def test_a_killed_writer_leaves_no_half_file(tmp_path, writer):
    process, size = writer
    process.kill()
    process.communicate()
    assert half_files(tmp_path)
    store = open_store(str(tmp_path))
    data = store.read("key")
    assert data == data[:1] * size
    assert store.list() == [StoredObject("key", size)]
    store.write("key", b"next")
    assert store.read("key") == b"next"
    assert half_files(tmp_path) == []


def test_a_writer_that_lives_keeps_its_half_file(tmp_path, writer):
    process, size = writer
    (half,) = half_files(tmp_path)
    open_store(str(tmp_path)).write("key", b"next")
    assert half_files(tmp_path) == [half]
    os.kill(process.pid, signal.SIGCONT)
    until(lambda: open_store(str(tmp_path)).size("key") == size)
    assert process.poll() is None


def test_the_half_files_of_killed_attempts_are_removed_with_their_folders(tmp_path):
    places = ["checkpoints/1/2/.tmp-a", "checkpoints/1/3/.tmp-b", "checkpoints/.tmp-c", "other/.tmp-d", ".tmp-e"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(b"half")
    (tmp_path / "checkpoints/1/3/whole").write_bytes(b"whole")
    open_store(str(tmp_path)).write("checkpoints/4/5/key", b"1")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"checkpoints/1/3/whole", "checkpoints/4/5/key", "other/.tmp-d", ".tmp-e"}
    assert not (tmp_path / "checkpoints/1/2").exists()
    open_store(str(tmp_path)).write("key", b"1")
    assert not (tmp_path / ".tmp-e").exists()
    assert (tmp_path / "other/.tmp-d").exists()  # the root may be any folder: it is not searched


@pytest.mark.parametrize(("operation", "place"), [("write", "replace"), ("create", "link")])
def test_a_half_file_that_another_process_removes_is_written_again(tmp_path, monkeypatch, operation, place):
    """It may see the file before it is locked, or not see the lock, on some network file systems."""
    real, removed = getattr(os, place), []

    def lose_the_first(source, target):
        if not removed:
            removed.append(source)
            os.unlink(source)
        real(source, target)

    monkeypatch.setattr(os, place, lose_the_first)
    getattr(open_store(str(tmp_path)), operation)("folder/key", b"data")
    assert open_store(str(tmp_path)).read("folder/key") == b"data"
    assert len(removed) == 1


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    """TensorBoard, say, may run as another user than the worker."""
    process = start("store.write('written', b'1'); store.create('created', b'1')", str(tmp_path / "runs"), {}, 0o027)
    assert process.communicate(timeout=PATIENCE_SECONDS)[0] == "done\n"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "runs").iterdir()}
    assert modes == {"written": 0o640, "created": 0o640}


def test_folders_may_be_listed_and_written_while_files_are_deleted(tmp_path):
    """As when one attempt of a run prunes checkpoints while another one looks for the newest."""
    store = open_store(str(tmp_path))
    ended = threading.Event()

    def churn(key):
        for _ in range(150):
            store.write(key, b"1")
            store.delete([key])

    def look():
        while not ended.is_set():
            assert {entry.key for entry in store.list()} <= {"p/one", "p/two"}

    with ThreadPoolExecutor(4) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        writing = [pool.submit(churn, key) for key in ("p/one", "p/two")]
        try:
            for future in writing:
                future.result()
        finally:
            ended.set()
        for future in looking:
            future.result()
    assert store.list() == []


@pytest.mark.parametrize("operation", ["write", "create"])
def test_a_folder_that_cannot_be_is_one_line(tmp_path, operation):
    (tmp_path / "file").write_bytes(b"in the way")
    store = open_store(str(tmp_path / "file"))
    with pytest.raises((UserError, StorageError), match="file"):
        getattr(store, operation)("key", b"1")


# S3 with other settings


def test_the_child_itself_works(s3, s3_uri):
    assert succeeds("store.write('a', b'1'); assert store.read('a') == b'1'", s3_uri, s3.env) is True


@pytest.mark.parametrize(
    "code",
    ["store.list()", "store.write('a', b'1')", "store.create('a', b'1')", "store.read_range('a', 0, 9)",
     "store.delete(['a'])", "store.write('a', bytes(17 << 20))"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("bucket", "changes", "words"),
    [
        ("datasets", {"AWS_SECRET_ACCESS_KEY": "wrong-key-wrong-key"}, "refused the credentials"),
        ("no-such-bucket", {}, "there is no bucket 'no-such-bucket'"),
    ],
)
def test_what_the_user_must_mend_is_said_at_once(s3, code, bucket, changes, words):
    kind, message, again = outcome(code, f"s3://{bucket}/prefix", {**s3.env, **changes})
    assert (kind, again) == ("UserError", False)
    assert words in message
    assert f"s3://{bucket}/prefix" in message
    assert s3.endpoint in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "refused the credentials"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ENDPOINT_URL": "localhost:9000"}, "localhost:9000"),
        ({"AWS_ENDPOINT_URL": "http://localhost:abc"}, "write AWS_ENDPOINT_URL as http://HOST:PORT"),
        ({"AWS_PROFILE": "not-there"}, "not-there"),
        ({"AWS_REGION": "eu_west!"}, "set AWS_REGION"),
        ({"AWS_CONFIG_FILE": __file__}, f"{__file__}; mend it, or what AWS_CONFIG_FILE"),
    ],
)
def test_unfit_settings_are_said_at_once(s3, s3_uri, changes, words):
    settings = {name: value for name, value in {**s3.env, **changes}.items() if value is not None}
    kind, message, again = outcome("store.list()", s3_uri, settings)
    assert (kind, again) == ("UserError", False)
    assert words in message
    assert s3_uri in message


def test_a_forgotten_address_is_asked_for(s3, s3_uri):
    settings = s3.env | {"AWS_ENDPOINT_URL": ""}  # which is none, for boto3
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:1"}  # so that AWS is never asked
    kind, message, _ = outcome("store.list()", s3_uri, {**settings, **nowhere})
    assert kind == "StorageError"
    assert "if the bucket is not at AWS, set AWS_ENDPOINT_URL" in message


@pytest.mark.parametrize(
    ("name", "least", "values"),
    [
        ("AUTOPAINTER_STORAGE_RETRY_SECONDS", "0", ["1m", "-1", "nan", "inf"]),
        ("AUTOPAINTER_STORAGE_TIMEOUT_SECONDS", "0.1", ["1m", "0", "-1", "nan", "inf"]),
    ],
)
def test_durations_that_are_none_are_named(monkeypatch, name, least, values):
    module = sys.modules["autopainter.storage.retry"].__file__
    for value in values:
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"^{name}: must be a number of seconds, at least {least}, got '{value}'$"):
            runpy.run_path(module)
    monkeypatch.setenv(name, least)
    assert runpy.run_path(module)[name.removeprefix("AUTOPAINTER_STORAGE_")] == float(least)


def test_the_region_is_taken_from_the_environment(s3, s3_uri):
    settings = {name: value for name, value in s3.env.items() if name != "AWS_DEFAULT_REGION"}
    code = "assert storage.s3.shared_client().meta.region_name == 'eu-north-1'"
    assert succeeds(code, s3_uri, {**settings, "AWS_REGION": "eu-north-1"}) is True


def test_a_server_that_never_comes_back_is_a_storage_error(s3, s3_uri):
    nobody = f"http://{HOST}:{free_ports(1)[0]}"
    for code in ("store.read('a')", "store.write('a', bytes(17 << 20))", "store.list()"):
        kind, message, _ = outcome(code, s3_uri, {**s3.env, "AWS_ENDPOINT_URL": nobody})
        assert kind == "StorageError"
        assert s3_uri in message
        assert nobody in message


def test_a_server_that_comes_back_while_a_call_is_tried_again(tmp_path):
    with SeaweedFS(tmp_path / "weed") as server:
        settings = {**server.env, "AUTOPAINTER_STORAGE_RETRY_SECONDS": "120"}
        uri = "s3://runs/here"
        assert succeeds("store.write('old', b'kept')", uri, settings) is True
        server.kill()
        code = "assert store.read('old') == b'kept'; assert store.create('new', b'1')"
        process = start(code, uri, settings)
        assert "attempt 1 failed, trying again" in process.stderr.readline()
        server.start()
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert out == "done\n", err
        assert server.env["AWS_SECRET_ACCESS_KEY"] not in err
        found = server.client().list_objects_v2(Bucket="runs", Prefix="here/")["Contents"]
        assert [entry["Key"] for entry in found] == ["here/new", "here/old"]


# S3 with faults


def test_a_cut_connection_is_tried_again(s3, s3_uri):
    data = os.urandom(1 << 20)
    open_store(s3_uri).write("key", data)
    code = "import hashlib; print(hashlib.sha256(store.read('key')).hexdigest(), storage.retries(), end=' ')"
    with FaultyProxy(s3.endpoint, pattern="key", script=["refuse", "cut", "cut"]) as proxy:
        process = start(code, s3_uri, {**s3.env, "AWS_ENDPOINT_URL": proxy.url})
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert out == f"{hashlib.sha256(data).hexdigest()} 3 done\n", err
        assert err.count("trying again") == 3
        assert len(proxy.asked) == 4


@pytest.fixture
def settings(s3):
    """Leads this process's client to another endpoint; in short times only where silence is the fault."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        def use(endpoint, retry_seconds=60, timeout_seconds=30):
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            stack.enter_context(storage_times(retry_seconds, timeout_seconds))

        yield use


SILENT = ("stall", "trickle")


@pytest.fixture
def proxy(s3, settings):
    """A proxy that all GETs of this process go through."""
    with FaultyProxy(s3.endpoint, pattern="") as proxy:
        settings(proxy.url)
        yield proxy


@pytest.mark.parametrize(
    ("fault", "span"),
    [
        *itertools.product(["cut", "reset", "stall", "trickle", "refuse", "500", "503"], [(1000, 90_000), None]),
        ("truncate", (1000, 90_000)),  # a whole object with a shorter Content-Length is a shorter object
    ],
)
def test_a_read_survives_faults_and_keeps_what_has_come(s3_uri, proxy, settings, fault, span):
    data = os.urandom(100_000)
    open_store(s3_uri).write("key", data)
    settings(proxy.url, timeout_seconds=1 if fault in SILENT else 30)
    store = open_store(s3_uri)
    proxy.begin({}, script=[fault, fault])
    before = storage.retries()
    got = store.read("key") if span is None else store.read_range("key", *span)
    assert got == (data[slice(*span)] if span else data)
    assert proxy.injected == {fault: 2}
    again = storage.retries() - before
    assert again == 2 or (fault in SILENT and again > 2)  # a starved server is silent as well
    firsts = [int(asked.removeprefix("bytes=").partition("-")[0] or 0) for _, asked in proxy.asked]
    if fault in ("cut", "truncate", *SILENT):
        assert firsts[0] < firsts[1] < firsts[2]
    elif fault != "reset":  # what that overtakes is lost
        assert firsts[0] == firsts[1] == firsts[2]


@pytest.mark.parametrize("fault", ["stall", "trickle", "503", "refuse"])  # cut for ever, a read still gets there
def test_faults_without_end_are_a_storage_error_in_time(s3_uri, proxy, settings, fault):
    open_store(s3_uri).write("key", b"x" * 100_000)
    settings(proxy.url, retry_seconds=1, timeout_seconds=0.3)
    store = open_store(s3_uri)
    proxy.begin({fault: 1})
    with pytest.raises(StorageError, match=f"{s3_uri}/key: ") as caught:
        store.read_range("key", 0, 100_000)
    assert not isinstance(caught.value, CorruptData)
    assert "\n" not in str(caught.value)


def test_a_503_that_the_server_takes_back(s3_uri, proxy):
    store = open_store(s3_uri)
    store.write("key", b"data")
    proxy.begin({}, script=["503", "500", "503"])
    assert store.read_range("key", 1, 3) == b"at"


@pytest.mark.parametrize("fault", ["cut", "reset", "stall", "refuse", "500", "503"])
def test_a_list_survives_faults(s3_uri, proxy, settings, fault):
    open_store(s3_uri).write("key", b"data")
    settings(proxy.url, timeout_seconds=1 if fault in SILENT else 30)
    store = open_store(s3_uri)
    proxy.begin({}, script=[fault, fault])
    assert store.list() == [StoredObject("key", 4)]
    assert proxy.injected == {fault: 2}


@pytest.mark.parametrize("fault", ["cut", "reset", "stall"])
def test_an_error_whose_own_body_does_not_come(s3_uri, proxy, settings, fault):
    open_store(s3_uri).write("key", b"data")
    settings(proxy.url, timeout_seconds=1 if fault in SILENT else 30)
    store = open_store(s3_uri)
    proxy.begin({}, script=[fault])
    with pytest.raises(CorruptData, match="ends at or before byte 7, expected 9"):
        store.read_range("key", 7, 9)
    assert proxy.injected == {fault: 1}


class BeforeRetry(logging.Handler):
    """Does something between a failed attempt and the next one."""

    def __init__(self, act):
        super().__init__()
        self.emit = lambda record: act()


@pytest.fixture
def before_retry():
    log, handlers = logging.getLogger("autopainter.storage.retry"), []

    def register(act):
        handlers.append(BeforeRetry(act))
        log.addHandler(handlers[-1])

    yield register
    for handler in handlers:
        log.removeHandler(handler)


@pytest.mark.parametrize("span", [(1000, 90_000), None])
def test_an_object_that_is_replaced_while_it_is_read_is_read_from_its_beginning(s3, s3_uri, proxy, before_retry, span):
    old, new = os.urandom(100_000), os.urandom(100_000)
    store = open_store(s3_uri)
    store.write("key", old)
    proxy.begin({}, script=["cut"])
    before_retry(lambda: store.write("key", new))
    before = storage.retries()
    got = store.read("key") if span is None else store.read_range("key", *span)
    assert got == (new[slice(*span)] if span else new)
    assert storage.retries() - before == 2


def test_an_object_that_gets_shorter_while_it_is_read_is_corrupt_data(s3_uri, proxy, before_retry):
    store = open_store(s3_uri)
    store.write("key", os.urandom(100_000))
    proxy.begin({}, script=["cut"])
    before_retry(lambda: store.write("key", os.urandom(50_000)))
    with pytest.raises(CorruptData, match="ends at byte 50000, expected 90000"):
        store.read_range("key", 1000, 90_000)


LARGE_BYTES = 250_000


@pytest.fixture
def parts(monkeypatch):
    """Objects of more than 100,000 bytes are large, and read in parts of so many."""
    monkeypatch.setattr("autopainter.storage.s3.PART_BYTES", 100_000)


@pytest.mark.usefixtures("parts")
def test_a_large_object_is_read_in_parts_that_survive_faults(s3_uri, proxy):
    data = os.urandom(LARGE_BYTES)
    store = open_store(s3_uri)
    store.write("key", data)
    proxy.begin({}, script=["", "cut", "503"])
    assert store.read_large("key", LARGE_BYTES) == data
    assert proxy.injected == {"cut": 1, "503": 1}
    stops = {int(asked.rpartition("-")[2]) + 1 for _, asked in proxy.asked}
    assert stops == {100_000, 200_000, 250_000}


@pytest.mark.usefixtures("parts")
def test_a_large_object_that_is_replaced_while_it_is_read_is_of_one_version(s3_uri, proxy, before_retry):
    old, new = os.urandom(LARGE_BYTES), os.urandom(LARGE_BYTES)
    store = open_store(s3_uri)
    store.write("key", old)
    proxy.begin({}, script=["", "", "503"])  # the last part comes when the others are there
    before_retry(lambda: store.write("key", new))
    assert store.read_large("key", LARGE_BYTES) == new


@pytest.mark.usefixtures("parts")
def test_a_large_object_of_another_size_is_never_cut(store):
    data = os.urandom(LARGE_BYTES)
    store.write("key", data)
    assert store.read_large("key", 100_001) == data
    with contextlib.suppress(CorruptData):
        assert store.read_large("key", LARGE_BYTES + 1) == data
    with pytest.raises(FileNotFoundError):
        store.read_large("missing", LARGE_BYTES)


class Odd(http.server.BaseHTTPRequestHandler):
    """An S3 server whose answers to GETs are those of ``script``: (status, headers, body); the last one repeats."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.headers.get("Range"))
        script = self.server.script
        status, headers, body = script.pop(0) if len(script) > 1 else script[0]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def odd(settings):
    """Answers to come, and the ranges that were asked for."""
    with http.server.ThreadingHTTPServer((HOST, 0), Odd) as server:
        server.script, server.asked = [], []
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        settings(f"http://{HOST}:{server.server_port}", PATIENCE_SECONDS)  # it answers at once
        yield server
        server.shutdown()
        thread.join()


def held(first, last, total="10", etag='"1"'):
    return {"Content-Range": f"bytes {first}-{last}/{total}", "ETag": etag}


CHUNKED = b"3\r\n012\r\n7\r\n3456789\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        pytest.param([(200, {"ETag": '"1"'}, b"0123456789")], [2], id="ranges are ignored"),
        pytest.param([(200, {"Content-Length": None, "Transfer-Encoding": "chunked"}, CHUNKED)], [2], id="and chunked"),
        pytest.param([(206, held(2, 4), b"234"), (206, held(5, 7), b"567")], [2, 5], id="fewer than asked"),
        pytest.param([(206, held(2, 4, "*"), b"234"), (206, held(5, 7, "*"), b"567")], [2, 5], id="size unknown"),
        pytest.param([(206, held(2, 9), b"23456789")], [2], id="more than asked"),
        pytest.param([(206, held(0, 9), b"0123456789")], [2], id="from before"),
        pytest.param([(206, held(2, 7), b"23"), (200, {"ETag": '"1"'}, b"0123456789")], [2, 4], id="then ignored"),
        pytest.param(
            [(206, held(2, 7, etag='"0"'), b"xx"), (206, held(4, 7), b"4567"), (206, held(2, 7), b"234567")], [2, 4, 2],
            id="replaced, but If-Match is ignored",
        ),
        pytest.param(
            [(206, held(2, 7, "9"), b"xx"), (206, held(4, 7), b"4567"), (206, held(2, 7), b"234567")], [2, 4, 2],
            id="another size",
        ),
        pytest.param(
            [(206, held(2, 7, etag='W/"1"'), b"23"), (206, held(4, 7, etag='W/"1"'), b"4567")], [2, 4], id="weak ETag"
        ),
        pytest.param([(503, {}, b"no XML"), (206, held(2, 7), b"234567")], [2, 2], id="503 of a gateway"),
        pytest.param([(429, {}, b""), (206, held(2, 7), b"234567")], [2, 2], id="429"),
    ],
)  # fmt: skip
def test_odd_servers_give_right_bytes(odd, answers, asked):
    odd.script[:] = answers
    assert open_store("s3://bucket").read_range("key", 2, 8) == b"234567"
    assert odd.asked == [f"bytes={first}-7" for first in asked]


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((200, {}, b"01234"), CorruptData, "ends at byte 5, expected 8"),
        ((206, held(2, 4, "5"), b"234"), CorruptData, "ends at byte 5, expected 8"),
        ((416, {"Content-Range": "bytes */2"}, b""), CorruptData, "ends at or before byte 2, expected 8"),
        ((206, held(4, 9), b"456789"), StorageError, "begins at byte 4"),
        ((206, {}, b"234567"), StorageError, "Content-Range"),
        ((206, held(2, 7), b""), StorageError, "at byte 2 of 2 to 8: the body ended"),
    ],
)
def test_odd_servers_that_cannot_be_read_from(odd, settings, answer, kind, words):
    settings(f"http://{HOST}:{odd.server_port}", retry_seconds=0.3)
    odd.script[:] = [answer]
    with pytest.raises(kind, match=r"s3://bucket/key: ") as caught:
        open_store("s3://bucket").read_range("key", 2, 8)
    assert words in str(caught.value)
    assert isinstance(caught.value, CorruptData) == (kind is CorruptData)


def test_what_may_not_be_deleted_is_said_at_once(odd):
    error = "<DeleteResult><Error><Key>key</Key><Code>{}</Code></Error></DeleteResult>"
    odd.script[:] = [
        (200, {}, error.format("InternalError").encode()),
        (200, {}, error.format("AccessDenied").encode()),
    ]
    before = storage.retries()
    with pytest.raises(StorageError, match="key cannot be deleted: AccessDenied"):
        open_store("s3://bucket").delete(["key"])
    assert storage.retries() - before == 1


def test_retries_are_counted_over_all_threads(s3_uri, proxy):
    store = open_store(s3_uri)
    store.write("key", b"0123456789" * 100)
    proxy.begin({}, script=["refuse"] * 20)
    before = storage.retries()
    with ThreadPoolExecutor(8) as pool:
        spans = [(first, first + 10) for first in range(0, 200, 10)]
        assert set(pool.map(lambda span: store.read_range("key", *span), spans)) == {b"0123456789"}
    assert storage.retries() - before == 20


# One object by its URI


def test_an_object_is_read_by_its_uri(root):
    open_store(root).write("a.json", b"{}")
    assert storage.read_uri(f"{root}/a.json") == b"{}"
    with pytest.raises(FileNotFoundError, match=r"b\.json"):
        storage.read_uri(f"{root}/b.json")


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"weights"
        self.send_response({"/file": 200, "/cut": 200, "/closed": 403, "/odd": 405}.get(self.path, 404))
        self.send_header("Content-Length", str(len(body) + (10 if self.path == "/cut" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def https(tmp_path):
    """A site with a certificate that nobody but its maker knows: (URL, certificate file)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "site.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = tmp_path / "site.key"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, private)
    with http.server.ThreadingHTTPServer((HOST, 0), Site) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"https://{HOST}:{server.server_port}", str(pem)
        server.shutdown()
        thread.join()


READ = "assert storage.read_uri(uri + '/file') == b'weights'"


def test_a_site_with_an_unknown_certificate_is_refused(https):
    url, certificate = https
    code = f"uri = {url!r}; {READ}"
    kind, message, _ = outcome(code, "/tmp", {})
    assert kind == "StorageError"
    assert "CERTIFICATE_VERIFY_FAILED" in message
    assert f"{url}/file" in message
    assert succeeds(code, "/tmp", {"SSL_CERT_FILE": certificate}) is True


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("/nothing", "FileNotFoundError", "not found"),
        ("/closed", "UserError", "the site refuses it (HTTP Error 403: Forbidden)"),
        ("/odd", "StorageError", "HTTP Error 405"),
        ("/cut", "StorageError", ""),
    ],
)
def test_a_site_that_does_not_give_the_file(https, path, kind, words):
    url, certificate = https
    found, message, again = outcome(f"storage.read_uri({url + path!r})", "/tmp", {"SSL_CERT_FILE": certificate})
    assert (found, again) == (kind, path == "/cut")
    assert f"{url}{path}" in message
    assert words in message


@pytest.mark.parametrize(
    "uri",
    [
        "https:///x",
        "https://h:port/x",
        "https://[::1/x",
        "https://h/my data/x",
        "https://h/m\u00e4rz",
        "https://h/a\nb",
    ],
)
def test_what_is_no_url_is_said_at_once(uri):
    with pytest.raises(UserError, match=r"not a URL; write https://HOST/PATH, with %20 for a space"):
        storage.read_uri(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:hidden@h/x",
        "https://h/x?sv=2024&sig=hidden",
        "https://h/x?sig=hidden",
        "s3://bucket/x?X-Amz-Signature=hidden",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri):
    for operation in (storage.read_uri, storage.open_store):
        with pytest.raises(UserError, match="a URI must hold no credentials") as error:
            operation(uri)
        assert "hidden" not in str(error.value)


@pytest.mark.parametrize("name", ["R&D/monkeys/size=512", "a?token=1", "me@home"])
def test_a_folder_may_have_any_name(tmp_path, name):
    open_store(f"{tmp_path}/{name}").write("x", b"1")
    assert storage.read_uri(f"{tmp_path}/{name}/x") == b"1"


def test_a_place_where_no_folder_can_be_made_is_refused():
    with pytest.raises(UserError, match="cannot be written"):
        storage.open_store("/proc/autopainter/data").write("file", b"")


def test_only_files_are_listed(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert [entry.key for entry in storage.open_store(str(tmp_path)).list()] == ["file"]


def keys(folder, prefix=""):
    return [entry.key for entry in storage.open_store(str(folder)).list(prefix)]


def test_linked_folders_are_listed_and_loops_end(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "real").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    (root / "real" / "a").write_bytes(b"1")
    (elsewhere / "deep" / "b").write_bytes(b"22")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(root / "real")
    (root / "real" / "up").symlink_to(root)
    (elsewhere / "deep" / "self").symlink_to(elsewhere / "deep")
    assert keys(root) == ["again/a", "linked/deep/b", "real/a"]
    assert keys(root, "linked/de") == ["linked/deep/b"]
    assert storage.open_store(str(root)).size("linked/deep/b") == 2


def test_a_link_that_leads_nowhere_is_listed(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"1")
    assert keys(tmp_path) == ["file", "gone", "loop"]


@pytest.fixture
def shared():
    """A folder that others may use, which is not below one of root alone, as ``tmp_path`` is."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@contextlib.contextmanager
def unprivileged():
    """As a user who may not read everything."""
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("mode", [0o000, 0o600], ids=["closed", "not searchable"])
def test_a_folder_that_may_not_be_read_is_named(shared, mode):
    (shared / "closed").mkdir()
    (shared / "closed" / "file").write_bytes(b"1")
    (shared / "open").write_bytes(b"1")
    (shared / "closed").chmod(mode)
    with unprivileged(), pytest.raises(UserError) as caught:
        keys(shared)
    assert "/closed: the folder cannot be read: Permission denied; grant that" in str(caught.value)
    with unprivileged():
        found = keys(shared, "op")  # what nobody asked for may be closed
    assert found == ["open"]
    (shared / "closed").chmod(0o700)


@pytest.mark.parametrize("name", ["lost+found", ".Trash-0"])
def test_what_systems_keep_on_a_disk_is_passed_over(shared, name):
    (shared / name).mkdir(mode=0)
    (shared / "file").write_bytes(b"1")
    with unprivileged():
        found = keys(shared)
    assert found == ["file"]
    (shared / name).chmod(0o700)
