"""`autopainter serve`: the page in a headless Chromium, with strokes by real pointer events, and the server behind it.

The run's network has learnt within seconds to paint hints where they lie, so that a painting tells which hints came to
the painter. Without Chromium and its driver the tests in the browser are skipped.
Run: pytest tests/test_serve.py
"""

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from painting import save_painters
from selenium import webdriver
from selenium.webdriver import Keys
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from waiting import PATIENCE_SECONDS

from autopainter import config as configuration
from autopainter.pixels import network_input, to_unit
from autopainter.serve.server import WAITING
from autopainter.trainer import build_generator

SIZE = 32
STOPPED = (130, ["", "autopainter: stopped; the same command continues"])
RED = (224, 49, 49)  # of the page's palette


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """URI of a run that paints the sketch's own grey, and hints where they lie."""
    texts = ["run.name=small", "run.storage=/tmp", "data.manifest=m", "train.steps=1", "loss.feature_weight=0",
             f"data.image_size={SIZE}", "model.generator_width=8", "train.precision=float32"]  # fmt: skip
    config = configuration.load(None, texts, {})
    torch.manual_seed(0)
    generator = build_generator(config).train()
    optimizer = torch.optim.Adam(generator.parameters(), lr=4e-3)
    random = np.random.default_rng(0)
    for _ in range(200):
        sketch = np.full((8, 1, SIZE, SIZE), 255, np.uint8)
        hint = np.zeros((8, 4, SIZE, SIZE), np.uint8)
        for index, (line, y, x) in enumerate(random.integers(0, SIZE - 4, (8, 3))):
            sketch[index, 0, line] = sketch[index, 0, :, line] = 0
            height, width = random.integers(2, 12, 2)
            hint[index, :, y : y + height, x : x + width] = np.array([*random.integers(0, 256, 3), 1])[:, None, None]
        sketch, hint = torch.from_numpy(sketch), torch.from_numpy(hint)
        mask = hint[:, 3:].float()
        target = torch.where(mask > 0, to_unit(hint[:, :3]), to_unit(sketch))
        error = (generator(network_input(sketch, hint)) - target).abs()
        optimizer.zero_grad()
        (error.mean() + (error * mask).sum() / mask.sum() / 3).backward()
        optimizer.step()
    return save_painters(tmp_path_factory.mktemp("run"), config.model_dump(mode="json"), [(7, generator, None)])


class Site:
    """A running ``autopainter serve``: its address, and requests to it."""

    def __init__(self, run, options=("--no-browser",), within=(), **environment):
        command = [*within, str(Path(sys.executable).parent / "autopainter"), "serve", "--run", run, "--port", "0"]
        self.process = subprocess.Popen([*command, *options], env=os.environ | environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        self.line = self.process.stdout.readline()
        found = re.match(r"http://([\d.]+):(\d+)/", self.line)
        assert found, self.process.communicate()
        self.url, self.host, self.port = found[0], found[1], int(found[2])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()  # if it still runs
        self.process.communicate()

    def request(self, method, path, body=None, content_type="application/json"):
        """Status, body and headers of an answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": content_type} if body is not None else {})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def paint(self, **order):
        """Post an order; the painted pixels."""
        status, body, headers = self.request("POST", "/paint", json.dumps(order))
        assert (status, headers["Content-Type"]) == (200, "image/png"), body
        return pixels(body)

    def end(self):
        """Ctrl-C: exit code, and the lines on stderr (the first, empty one ends the terminal's line with its ^C)."""
        self.process.send_signal(signal.SIGINT)
        return self.ended()

    def ended(self):
        """Wait for its end: exit code, and the lines on stderr."""
        _, errors = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, errors.splitlines()


@pytest.fixture(scope="module")
def site(run):
    with Site(run) as running:
        yield running
        assert running.end() == STOPPED


def until(condition):
    WebDriverWait(None, PATIENCE_SECONDS, 0.02).until(lambda _: condition())


def pixels(data):
    return np.asarray(PIL.Image.open(io.BytesIO(data)))


def png(image):
    data = io.BytesIO()
    PIL.Image.fromarray(image).save(data, "png")
    return data.getvalue()


def text(data):
    return base64.b64encode(data).decode()


def drawing(height=SIZE, width=SIZE):
    """A black line along the lower part of a white paper: uint8 [H, W, 3]."""
    sketch = np.full((height, width, 3), 255, np.uint8)
    sketch[height * 3 // 4] = 0
    return sketch


def patch(color, height=SIZE, width=SIZE):
    """A hint in the upper left quarter: uint8 [H, W, 4]."""
    hints = np.zeros((height, width, 4), np.uint8)
    hints[: height // 2, : width // 2] = (*color, 255)
    return hints


GOOD = {"size": SIZE, "sketch": text(png(drawing()))}


# The server


@pytest.mark.parametrize("size", [16, 32, 128])
def test_it_paints_what_the_command_paints(site, run, succeed, tmp_path, size):
    sketch = np.random.default_rng(0).integers(0, 256, (90, 61, 3), np.uint8)
    hints = patch(RED, 90, 61)
    files = [tmp_path / name for name in ("sketch.png", "hints.png", "painted.png")]
    files[0].write_bytes(png(sketch))
    files[1].write_bytes(png(hints))
    succeed("paint", "--run", run, files[0], "--hints", files[1], "--size", size, "-o", files[2])
    painted = site.paint(size=size, sketch=text(png(sketch)), hints=text(png(hints)))
    assert (painted == pixels(files[2].read_bytes())).all()
    assert max(painted.shape) == size
    assert (site.paint(size=size, sketch=text(png(sketch))) != painted).any()


def test_a_transparent_sketch_lies_on_white(site):
    ink = np.zeros((SIZE, SIZE, 4), np.uint8)
    ink[..., 3] = 255 - drawing()[..., 0]
    assert (site.paint(size=SIZE, sketch=text(png(ink))) == site.paint(**GOOD)).all()


def test_it_says_what_it_paints_with(site, run):
    assert site.line == f"{site.url} paints with step 7 of {run}; Ctrl-C ends it\n"
    _, body, _ = site.request("GET", "/about")
    assert json.loads(body) == {"run": "small", "step": 7, "size": 32, "sizes": [16, 32, 64, 128], "edge": 1024}


def test_it_listens_on_this_machine_only_and_lets_the_page_load_nothing_from_elsewhere(site):
    assert site.host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", site.port)).close()
    for path in ("/", "/page/page.js", "/about", "/nothing"):
        status, _, headers = site.request("GET", path)
        assert status == (404 if path == "/nothing" else 200)
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")


@pytest.mark.parametrize("path", ["/page/", "/page/../server.py", "/page/%2e%2e/server.py", "/page/../../paint.py"])
def test_it_gives_no_other_files(site, path):
    assert site.request("GET", path)[0] in (403, 404)


def raw(running, request):
    """Status of the answer to these bytes."""
    with socket.create_connection((running.host, running.port), timeout=60) as connection:
        connection.sendall(request)
        return int(connection.makefile("rb").readline().split()[1])


PAINT = b"POST /paint HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (PAINT + b"Content-Encoding: gzip\r\nContent-Length: 8\r\n\r\nno gzip.", 400),
        (PAINT + b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n", 400),
        (b"GET /page/" + b"a" * 256 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 404),
        (b"GET /" + b"a" * 10000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"nonsense\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_a_request_that_is_malformed_is_the_client_s_fault_and_no_traceback(site, request_bytes, status):
    assert raw(site, request_bytes) == status
    assert site.paint(**GOOD).shape == (32, 32, 3)  # and when the site ends, only its last line is on stderr


def huge():
    """A PNG of a few bytes whose header says 20000 x 20000."""
    data = bytearray(png(np.zeros((1, 1, 3), np.uint8)))
    data[16:24] = (20000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sketch": text(b"no picture")}, "sketch: not an image"),
        ({"sketch": text(png(drawing())[:-40])}, "sketch: damaged"),
        ({"sketch": text(huge())}, "sketch: more than"),
        ({"sketch": text(png(drawing(8, 1025)))}, "sketch: 1025x8; at most 1024x1024"),
        ({"sketch": text(png(np.full((32, 32, 3), 255, np.uint8)))}, "The sketch is blank"),
        ({"sketch": "a"}, "sketch: "),
        ({"hints": text(huge())}, "hints: more than"),
        ({"hints": text(png(patch(RED))[:-40])}, "hints: must be a whole PNG"),
        ({"hints": text(b"")}, "hints: not an image"),
        ({"hints": text(png(np.full((32, 32, 4), 255, np.uint8)))}, "hints: hints must be a PNG that is transparent"),
        ({"hints": text(png(drawing()))}, "hints: hints must be a PNG that is transparent"),
        ({"hints": text(png(patch(RED, 32, 16)))}, "hints: 16x32, the sketch is 32x32"),
        ({"size": 33}, "size: must be one of 16, 32, 64, 128, got 33"),
        ({"size": None}, "size: "),
        ({"sizes": 32}, "sizes: "),
        (None, "request: "),
    ],
)
def test_what_cannot_be_painted_is_refused_in_one_line(site, changes, words):
    body = json.dumps(GOOD | changes) if changes else "{"
    status, answer, headers = site.request("POST", "/paint", body)
    assert (status, headers.get_content_type()) == (422, "text/plain")
    assert answer.decode().startswith(words)
    assert "\n" not in answer.decode()


def test_other_sites_and_long_requests_are_refused(site):
    assert site.request("POST", "/paint", json.dumps(GOOD), "text/plain")[0] == 415  # what a form elsewhere can send
    assert site.request("POST", "/paint", json.dumps(GOOD | {"sketch": "A" * (10 << 20)}))[0] == 413
    assert site.paint(**GOOD).shape == (32, 32, 3)


def test_it_answers_to_its_own_names_alone(site):
    """A site may let its own name point here; the browser then takes this server for a part of the site."""

    def status(host, target=b"/about"):
        return raw(site, b"GET %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (target, host))

    for host in (b"localhost", b"LOCALHOST:1", b"127.0.0.1", b"127.0.0.1:7860", b"[::1]", b"[::1]:80"):
        assert (host, status(host)) == (host, 200)
    for host in (b"evil.example", b"evil.example:7860", b"127.0.0.1.evil.example", b"localhost.evil.example", b"",
                 b"192.168.0.1", b"[::2]", b"localhost@evil.example"):  # fmt: skip
        assert (host, status(host), status(host, b"/none")) == (host, 403, 403)
    assert raw(site, PAINT.replace(b"127.0.0.1", b"evil.example") + b"Content-Length: 2\r\n\r\n{}") == 403


def test_it_answers_to_the_name_that_it_was_given(run):
    with Site(run, ("--no-browser", "--host", "127.0.0.3")) as running:
        assert running.request("GET", "/about")[0] == 200
        assert raw(running, b"GET /about HTTP/1.1\r\nHost: evil.example\r\n\r\n") == 403
    with Site(run, ("--no-browser", "--host", "0.0.0.0")) as running:  # others reach it, by names it does not know
        assert raw(running, b"GET /about HTTP/1.1\r\nHost: machine.example\r\n\r\n") == 200


def test_people_get_their_own_pictures(site):
    orders = [GOOD | {"hints": text(png(patch(color)))} for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    alone = [site.paint(**order) for order in orders]
    assert [int(picture[4, 4].argmax()) for picture in alone] == [0, 1, 2]
    with ThreadPoolExecutor(WAITING) as people:
        together = list(people.map(lambda order: site.paint(**order), orders * 8))
    for number, picture in enumerate(together):
        assert (picture == alone[number % 3]).all()


def test_the_queue_is_bounded_and_places_come_free(site):
    head = f"POST /paint HTTP/1.1\r\nHost: {site.host}\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{"
    waiting = [socket.create_connection((site.host, site.port)) for _ in range(WAITING)]
    for connection in waiting:
        connection.sendall(head.encode())  # and the rest never comes

    def status_becomes(wanted):
        until(lambda: site.request("POST", "/paint", json.dumps(GOOD))[0] == wanted)

    status_becomes(503)
    assert b"busy" in site.request("POST", "/paint", json.dumps(GOOD))[1]
    assert site.request("GET", "/")[0] == 200
    for connection in waiting:
        connection.close()
    status_becomes(200)


# The command


def test_it_opens_the_page_and_ctrl_c_leaves_nothing(run, tmp_path):
    browser, opened, temporary = (tmp_path / name for name in ("browser", "opened", "temporary"))
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}.part; mv {opened}.part {opened}\n')
    browser.chmod(0o755)
    temporary.mkdir()
    with Site(run, (), BROWSER=f"{browser} %s", TMPDIR=str(temporary)) as running:
        until(opened.exists)
        assert opened.read_text() == f"{running.url}\n"
        running.paint(**GOOD)
        with socket.create_connection((running.host, running.port)):  # a browser that keeps its connection
            assert running.end() == STOPPED
    assert list(temporary.iterdir()) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((running.host, running.port)).close()


def unanswered(running):
    """A request that holds its place, because the rest of it never comes."""
    connection = socket.create_connection((running.host, running.port))
    connection.sendall(f"POST /paint HTTP/1.1\r\nHost: {running.host}\r\nContent-Type: application/json\r\n"
                       "Content-Length: 9\r\n\r\n{".encode())  # fmt: skip
    return connection


def refuses(running):
    try:
        socket.create_connection((running.host, running.port)).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(run, number):
    with Site(run) as running, ThreadPoolExecutor(WAITING) as people, unanswered(running):  # which the end waits for
        for _ in range(WAITING - 1):  # some are painted meanwhile
            people.submit(running.request, "POST", "/paint", json.dumps(GOOD | {"size": 128}))
        until(lambda: running.request("POST", "/paint", json.dumps(GOOD))[0] in (200, 503))
        running.process.send_signal(number)
        until(lambda: refuses(running))
        running.process.send_signal(number)
        code, said = running.ended()
    assert (code, said[-1:]) == (128 + number, STOPPED[1][1:])
    assert len([line for line in said if line]) == 1


def test_sigterm_ends_it_like_ctrl_c(run):
    with Site(run) as running:
        running.paint(**GOOD)
        running.process.terminate()
        assert running.ended() == (143, STOPPED[1][1:])


def test_sigterm_ends_it_as_process_1_of_a_container(run):
    within = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("a process may not have a process namespace of its own here: it is not tried as process 1")
    with Site(run, within=within) as running:
        (first,) = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        assert running.ended() == (143, STOPPED[1][1:])


def test_what_the_command_refuses(call, run, tmp_path, site):
    for options, words in (
        (["--run", run, "--port", site.port], [f"--port {site.port}", "in use"]),
        (["--run", run, "--host", "192.0.2.1"], ["--host 192.0.2.1"]),
        (["--run", run, "--host", ".."], ["--host ..", "no host name"]),
        (["--run", tmp_path, "--port", 0], [str(tmp_path), "no checkpoint"]),
        (["--run", run, "--port", 0, "--step", 8], ["step 8", "[7]"]),
    ):
        done = call("serve", *options, "--no-browser")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        for word in words:
            assert word in done.stderr


def test_a_missing_extra_is_named(call, run, monkeypatch):
    for name in ("aiohttp", "autopainter.serve.server", "autopainter.serve"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)  # as if it were not installed
    done = call("serve", "--run", run, "--port", 0, "--no-browser")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "pip install -c constraints.txt -e '.[serve]'" in done.stderr


# The page


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless browser, and the folder of its downloads."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not both installed: the page is not tried in a browser")
    folder = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    arguments = ["headless=new", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"]
    if os.geteuid() == 0:  # for whom Chromium has no sandbox
        arguments.append("no-sandbox")
    for argument in [*arguments, f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{argument}")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "localhost,127.0.0.1")
        browser = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
        yield browser, folder
        browser.quit()


class Page:
    """The page as a user meets it."""

    def __init__(self, browser, folder, url):
        self.browser, self.folder, self.url = browser, folder, url
        self.logged("browser"), self.logged("performance")  # of the page before
        browser.get(url)
        until(lambda: self["status"].text.startswith("Painted"))  # the example that it begins with

    def __getitem__(self, name):
        return self.browser.find_element(By.ID, name)

    def logged(self, kind):
        """What the browser has logged since the last call."""
        return [entry["message"] for entry in self.browser.get_log(kind)]

    def requests(self):
        """URLs that the page has asked for since the last call."""
        events = [json.loads(message)["message"] for message in self.logged("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        # The browser's own first tab asks for something too.
        return [request["request"]["url"] for request in sent if request["documentURL"].startswith(self.url)]

    def painted_by(self, act):
        """Act, wait until that is painted, and download the picture."""
        before = self["painted"].get_attribute("src")
        act()
        until(lambda: self["painted"].get_attribute("src") != before)
        self["download"].click()
        until(lambda: list(self.folder.glob("*.png")))
        (file,) = self.folder.glob("*.png")
        data = file.read_bytes()
        file.unlink()
        return file.name, pixels(data).astype(int)

    def picture(self):
        """The pixels of the painted picture that is shown; none while another one comes."""
        shown = self.browser.execute_script("""
            if (!painted.complete || !painted.naturalWidth) return null;
            const canvas = new OffscreenCanvas(painted.naturalWidth, painted.naturalHeight);
            const context = canvas.getContext("2d");
            context.drawImage(painted, 0, 0);
            return [canvas.height, canvas.width, ...context.getImageData(0, 0, canvas.width, canvas.height).data];
        """)
        return shown and np.reshape(shown[2:], (*shown[:2], 4))[..., :3]

    def says(self, act, *words):
        """Act, and wait for an error message with these words."""
        act()
        until(lambda: all(word in self["status"].text for word in words))
        assert "error" in self["status"].get_attribute("class")

    def open(self, path):
        self["file"].send_keys(str(path))

    def tool(self, name):
        self.browser.find_element(By.XPATH, f"//fieldset//span[.='{name}']").click()

    def drag(self, start, end, kind="mouse"):
        """A stroke between two places of the sketch, given as shares of its width and height."""
        paper = self["paper"]
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", paper)
        places = [{"x": int((x - 0.5) * paper.size["width"]), "y": int((y - 0.5) * paper.size["height"])}
                  for x, y in (start, end)]  # fmt: skip
        builder = ActionBuilder(self.browser, mouse=PointerInput(kind, kind), duration=50)
        pointer = builder.pointer_action
        pointer.move_to(paper, **places[0]).pointer_down().move_to(paper, **places[1]).pointer_up()
        builder.perform()


@pytest.fixture
def page(chromium, site):
    return Page(*chromium, site.url)


@pytest.fixture
def sketch_file(tmp_path):
    path = tmp_path / "my.sketch.png"
    path.write_bytes(png(drawing(3 * SIZE, 3 * SIZE)))
    return path


STROKE = (slice(8, 11), slice(10, 16))  # where a stroke from (0.25, 0.3) to (0.6, 0.3) lies, of 32 x 32
FAR = (slice(16, 32), slice(0, 32))


def test_a_stroke_reaches_the_painter_as_a_hint_where_it_was_drawn(page, sketch_file, site):
    name, plain = page.painted_by(lambda: page.open(sketch_file))
    assert (name, plain.shape) == ("my.sketch-painted.png", (SIZE, SIZE, 3))
    in_file = site.paint(size=SIZE, sketch=text(sketch_file.read_bytes()))
    assert (plain == in_file).all()  # the sketch came to the painter as it is in the file
    assert plain[STROKE].min() > 200

    page["width"].send_keys(Keys.END)
    _, hinted = page.painted_by(lambda: page.drag((0.25, 0.3), (0.6, 0.3)))
    assert np.abs(hinted[STROKE] - RED).mean() < 40
    assert np.abs(hinted[FAR] - plain[FAR]).mean() < 10

    page.browser.find_element(By.CSS_SELECTOR, "[title=blue]").click()
    _, blue = page.painted_by(lambda: page.drag((0.25, 0.3), (0.6, 0.3)))
    assert (blue[STROKE].argmax(axis=-1) == 2).all()
    assert (page.painted_by(page["undo"].click)[1] == hinted).all()
    page.tool("Erase colour")
    assert (page.painted_by(lambda: page.drag((0.1, 0.3), (0.9, 0.3)))[1] == plain).all()
    assert (page.painted_by(page["undo"].click)[1] == hinted).all()
    assert (page.painted_by(page["clear"].click)[1] == plain).all()

    assert page.logged("browser") == []
    asked = page.requests()
    assert f"{page.url}paint" in asked
    assert [url for url in asked if not url.removeprefix("blob:").startswith(page.url)] == []


def test_what_changes_during_a_painting_is_painted_after_it(page, sketch_file):
    _, plain = page.painted_by(lambda: page.open(sketch_file))
    _, hinted = page.painted_by(lambda: page.drag((0.25, 0.3), (0.6, 0.3)))
    assert (hinted != plain).any()
    page.requests()
    page.browser.execute_script("paint.click(); clear.click(); paint.click()")  # elements by their id
    until(lambda: np.array_equal(page.picture(), plain))
    assert page.requests().count(f"{page.url}paint") == 2


def test_lines_are_drawn_and_erased(page):
    page["blank"].click()
    page.says(page["paint"].click, "The sketch is blank")
    _, drawn = page.painted_by(lambda: page.drag((0.2, 0.5), (0.8, 0.5)))
    assert drawn[14:18, 10:22].mean(axis=(1, 2)).min() < 100  # a dark line
    page.tool("Erase line")
    page["width"].send_keys(Keys.END)
    page.says(lambda: page.drag((0.1, 0.5), (0.9, 0.5)), "The sketch is blank")


def test_a_sketch_of_any_shape_in_the_size_chosen(page, tmp_path):
    path = tmp_path / "wide.png"
    path.write_bytes(png(drawing(700, 2100)))
    _, painted = page.painted_by(lambda: page.open(path))
    assert painted.shape == (11, 32, 3)
    _, larger = page.painted_by(lambda: page["size"].send_keys("64"))
    assert larger.shape == (21, 64, 3)


def test_nothing_is_painted_by_itself_if_that_is_not_wanted(page):
    page["auto"].click()
    page.requests()
    page.drag((0.3, 0.3), (0.6, 0.3))
    page.painted_by(page["paint"].click)
    assert page.requests().count(f"{page.url}paint") == 1


def test_a_file_that_is_no_picture_is_named(page, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    before = page["painted"].get_attribute("src")
    page.says(lambda: page.open(path), "broken.png", "no picture")
    assert page["painted"].get_attribute("src") == before


def test_a_finger_on_a_narrow_screen(page):
    page.browser.set_window_size(500, 844)  # the narrowest window
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                 {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})  # fmt: skip
    try:
        assert page.browser.execute_script("return document.documentElement.scrollWidth") == 360
        page["width"].send_keys(Keys.END)
        _, hinted = page.painted_by(lambda: page.drag((0.25, 0.3), (0.6, 0.3), "touch"))
        assert (hinted[STROKE].argmax(axis=-1) == 0).all()
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.browser.set_window_size(1280, 900)


def test_the_page_says_that_its_server_is_gone(chromium, run):
    with Site(run) as running:
        page = Page(*chromium, running.url)
        assert running.end() == STOPPED
    page.says(page["paint"].click, "does not answer", "autopainter serve")
