"""The store: one contract over folders and S3, against real files and a real SeaweedFS (notes/streaming.md A.2).

What a client with other settings meets (credentials, endpoint, a server that is down) is seen in a process of its own,
because a process has one client. Run: pytest tests/test_storage.py
"""

import contextlib
import datetime
import hashlib
import http.server
import ipaddress
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from services import HOST, SeaweedFS, child_env, free_ports

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
    out, err = process.communicate(timeout=60)
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


def test_a_killed_writer_leaves_no_half_file(tmp_path):
    size = 8 << 20
    code = f"for n in range(10**9): store.write('key', b'%d' % (n % 10) * {size}); print(n)"
    process = start(code, str(tmp_path), {})

    def half_files():
        return [name for name in os.listdir(tmp_path) if name != "key"]

    try:
        process.stdout.readline()
        while not half_files():  # until it stands still inside a write
            while not half_files():
                pass
            os.kill(process.pid, signal.SIGSTOP)
            while "State:\tT" not in Path(f"/proc/{process.pid}/status").read_text():
                pass
            if not half_files():
                os.kill(process.pid, signal.SIGCONT)
    finally:
        process.kill()
        process.communicate()
    store = open_store(str(tmp_path))
    data = store.read("key")
    assert data == data[:1] * size
    assert store.list() == [StoredObject("key", size)]
    store.write("key", b"next")
    assert store.read("key") == b"next"


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    """TensorBoard, say, may run as another user than the worker."""
    process = start("store.write('written', b'1'); store.create('created', b'1')", str(tmp_path / "runs"), {}, 0o027)
    assert process.communicate(timeout=60)[0] == "done\n"
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
        ({"AWS_PROFILE": "not-there"}, "not-there"),
    ],
)
def test_unfit_settings_are_said_at_once(s3, s3_uri, changes, words):
    settings = {name: value for name, value in {**s3.env, **changes}.items() if value is not None}
    kind, message, again = outcome("store.list()", s3_uri, settings)
    assert (kind, again) == ("UserError", False)
    assert words in message
    assert s3_uri in message


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
        out, err = process.communicate(timeout=120)
        assert out == "done\n", err
        assert server.env["AWS_SECRET_ACCESS_KEY"] not in err
        found = server.client().list_objects_v2(Bucket="runs", Prefix="here/")["Contents"]
        assert [entry["Key"] for entry in found] == ["here/new", "here/old"]


class CuttingProxy:
    """Passes TCP connections on to the S3 server; cuts the first ones after so many bytes of their answer."""

    def __init__(self, port, cuts):
        self.port, self.cuts, self.connections = port, list(cuts), 0
        self._server = socket.create_server((HOST, 0))
        self.url = f"http://{HOST}:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._server.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection((HOST, self.port))
                limit = self.cuts.pop(0) if self.cuts else None
                self.connections += 1
                threading.Thread(target=self._pass, args=(near, far, near, None), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, near, limit), daemon=True).start()

    @staticmethod
    def _pass(source, target, client, limit):
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                passed += len(data)
                if limit is not None and passed > limit:
                    break
                target.sendall(data)
        for end in (source, target) if limit is not None or source is client else (target,):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_cut_connection_is_tried_again(s3, s3_uri):
    data = os.urandom(1 << 20)
    open_store(s3_uri).write("key", data)
    proxy = CuttingProxy(s3.port, cuts=[0, 300_000, 900_000])  # before the answer, and twice inside the body
    code = "import hashlib; print(hashlib.sha256(store.read('key')).hexdigest(), end=' ')"
    process = start(code, s3_uri, {**s3.env, "AWS_ENDPOINT_URL": proxy.url, "AUTOPAINTER_STORAGE_RETRY_SECONDS": "60"})
    out, err = process.communicate(timeout=60)
    proxy.close()
    assert out == f"{hashlib.sha256(data).hexdigest()} done\n", err
    assert err.count("trying again") == 3
    assert proxy.connections == 4


# One object by its URI


def test_an_object_is_read_by_its_uri(root):
    open_store(root).write("a.json", b"{}")
    assert storage.read_uri(f"{root}/a.json") == b"{}"
    with pytest.raises(FileNotFoundError, match=r"b\.json"):
        storage.read_uri(f"{root}/b.json")


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"weights"
        self.send_response(200 if self.path in ("/file", "/cut") else 404)
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


@pytest.mark.parametrize(("path", "words"), [("/nothing", "404"), ("/cut", "")])
def test_a_site_that_does_not_give_the_file_is_a_storage_error(https, path, words):
    url, certificate = https
    kind, message, _ = outcome(f"storage.read_uri({url + path!r})", "/tmp", {"SSL_CERT_FILE": certificate})
    assert kind == "StorageError"
    assert f"{url}{path}" in message
    assert words in message
