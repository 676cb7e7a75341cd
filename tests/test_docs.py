"""What README and docs tell people to type: all of it is checked, what is cheap is run, and versions agree.

Run: pytest tests/test_docs.py
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import boto3
import check_docs
import cv2
import numpy as np
import pytest
from conftest import ROOT, Done

import autopainter
from autopainter import config as configuration

README = (ROOT / "README.md").read_text()


def test_nothing_is_wrong() -> None:
    # In a process of its own, because asking the scripts for their help imports them.
    done = subprocess.run([sys.executable, "scripts/check_docs.py"], cwd=ROOT, text=True, capture_output=True)
    assert (done.stdout, done.returncode) == ("nothing is wrong\n", 0), done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```bash\nautopainter pant x\n```", "there is no command pant"),
        ("```bash\nX=1 autopainter paint --run r --colour red s.png -o p.png\n```", "--colour"),
        ("```bash\nautopainter pack images PICTURES \\\n  --size many DESTINATION\n```", "'many' is not a valid"),
        ("```bash\nautopainter pack images PICTURES\n```", "Missing argument"),
        ("`autopainter evaluate --metric psnr`", "no option --metric"),
        ("```bash\nautopainter train --config job/configs/quickstart.yaml --set train.stepz=3\n```", "train.stepz"),
        ("```bash\nautopainter train --config job/configs/slowstart.yaml\n```", "slowstart.yaml"),
        ("```bash\nfor f in a; do kubectl exec x -- autopainter journl RUN; done\n```", "there is no command journl"),
        ("```bash\npython job/train.py --config CONFIG --set train.steps=many\n```", "train.steps"),
        ("```bash\npython scripts/dashboard.py --checks\n```", "dashboard.py has no option --checks"),
        ("```bash\nbash scripts/cluster_e2e.sh --kind term\n```", "cluster_e2e.py has no option --kind"),
        ("```bash\nbash scripts/image.sh --gpu\n```", "image.sh has no option --gpu"),
        ("```bash\nbash scripts/slowstart.sh\n```", "there is no scripts/slowstart.sh"),
        ("```bash\nkubectl apply -f k8s/60-train.yaml\n```", "there is no k8s/60-train.yaml"),
        ("```bash\npip install '.[exports]'\n```", "there is no extra exports"),
        ("```bash\nfrobnicate x\n```", "nobody knows this program"),
        ("```bash\nif true\n```", "no shell script"),
        ("```\nautopainter doctor\n```", "not marked as bash"),
        ("```python\nimport\n```", "no Python"),
        ("[more](nowhere.md)", "there is no nowhere.md"),
        ("# Here\n[more](#there)", "has no title #there"),
        ("![a picture](nothing.png)", "there is no nothing.png"),
        ("`model.norm: none`", "model.norm"),
        ("`data.sizes`", "data.sizes is no field"),
        ("see tests/test_docs.py::test_everything", "there is no test test_docs.py::test_everything"),
    ],
)
def test_a_fault_is_found(text: str, said: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"A page.\n\n{text}\n")
    found = check_docs.faults(page)
    assert [fault for fault in found if said in fault], found


def test_what_is_right_is_not_a_fault(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[here](#a-page), `train.steps=100`, `autopainter checkpoints list|prune RUN`, `s3://datasets/mine`\n"
        "```bash\nA=1 autopainter paint --run RUN x.png -o y.png | head   # --nothing\n"
        'x() { true; }; x; autopainter inspect "$(x)"\n```\n'
    )
    assert check_docs.faults(page) == []


def typed(text: str) -> list[list[str]]:
    """The words of the commands in a page's bash blocks."""
    script = "".join(block.text for block in check_docs.blocks(text) if block.language == "bash")
    return [command.words for command in check_docs.commands(script)]


def ours(text: str) -> list[list[str]]:
    """The words after autopainter of those of them that are run here."""
    found = [words[1:] for words in typed(text) if words[0] == "autopainter"]
    return [words for words in found if f"autopainter {words[0]}" not in check_docs.RUN_ELSEWHERE]


@pytest.fixture
def place(
    tmp_path: Path, s3: object, pictures: Path, feature_weights: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with what the pages speak of, and settings that make their run a tiny one."""
    if "autopainter" not in [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]]:
        boto3.client("s3").create_bucket(Bucket="autopainter")
    for name, value in {
        "DATA__MANIFEST": "s3://datasets/mine/manifest.json", "DATA__IMAGE_SIZE": 32, "MODEL__GENERATOR_WIDTH": 8,
        "MODEL__DISCRIMINATOR_WIDTH": 8, "TRAIN__STEPS": 2, "TRAIN__THREADS": 1, "TRAIN__PRECISION": "float32",
        "LOSS__VGG_WEIGHTS": feature_weights[0], "LOSS__VGG_SHA256": feature_weights[1],
    }.items():  # fmt: skip
        monkeypatch.setenv(f"AUTOPAINTER__{name}", str(value))
    (tmp_path / "job").symlink_to(ROOT / "job")
    for folder in ("PICTURES", "PAIRS", "drawings", "hints"):
        (tmp_path / folder).mkdir()
    for path in sorted(pictures.iterdir())[:40]:
        shutil.copy(path, tmp_path / "PICTURES")
        picture = cv2.imread(str(path))
        drawing = np.where(picture.max(axis=2) < 30, 0, 255).astype(np.uint8)
        pair = np.hstack([picture, cv2.cvtColor(drawing, cv2.COLOR_GRAY2BGR)])
        cv2.imwrite(str(tmp_path / "PAIRS" / path.name), pair)
    for name in ("sketch.png", "more.png", "photo.jpg", "drawings/one.png"):
        cv2.imwrite(str(tmp_path / name), drawing)
    strokes = np.zeros((48, 48, 4), np.uint8)
    strokes[20:24] = (0, 0, 255, 255)
    for name in ("hints.png", "hints/one.png"):
        cv2.imwrite(str(tmp_path / name), strokes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_do_what_they_say(place: Path, call: Callable[..., Done]) -> None:
    """README's ways in, one after the other; then, with the run that they made, those of other pages."""

    def run(words: list[str]) -> None:
        if words[0] == "train":  # it sets up logging for a whole process
            program = [str(Path(sys.executable).parent / "autopainter"), *words]
            done = subprocess.run(program, env=os.environ, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr
        else:
            done = call(*words)
            assert done.returncode == 0, (words, done)

    ways = ours(README)
    assert [words[0] for words in ways] == [
        "pack", "pack", "inspect", "train", "doctor", "journal", "checkpoints", "evaluate", "paint",
    ]  # fmt: skip
    for words in ways:
        run(words)
    for name in ("sheet.png", "painted.png"):
        assert cv2.imread(str(place / name)) is not None
        (place / name).unlink()
    run(["checkpoints", "pull", "s3://autopainter/runs/quickstart-64", "-o", "RUN"])
    for page, count in (("data", 3), ("evaluation", 1), ("painting", 4)):
        commands = ours((ROOT / f"docs/{page}.md").read_text())
        assert len(commands) == count
        for words in commands:
            run(words)
    for name in ("sheet.png", "painted.png", "painted/one.png", "painted/more.png"):
        assert cv2.imread(str(place / name)) is not None


def test_ray_makes_a_token_as_the_readme_says(tmp_path: Path) -> None:
    words = ["ray", "get-auth-token", "--generate"]
    assert words in typed(README)
    program = str(Path(sys.executable).parent / words[0])
    subprocess.run([program, *words[1:]], env=os.environ | {"HOME": str(tmp_path)}, check=True, capture_output=True)
    assert (tmp_path / ".ray" / "auth_token").read_text().strip()


def test_every_command_of_the_readme_is_run_somewhere() -> None:
    for words in typed(README):
        if words[0] not in ("source", "export") and words[1:] not in ours(README):
            runners = [by for start, by in check_docs.RUN_ELSEWHERE.items() if " ".join(words).startswith(start)]
            assert [(ROOT / runner).exists() for runner in runners] == [True], words


def test_the_table_of_fields_is_what_the_program_says(call: Callable[..., Done]) -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    table = call("fields", "--markdown").stdout
    assert table.count("\n| `") == len(configuration.fields())
    assert page.endswith(f"<!-- made by: autopainter fields --markdown -->\n{table}"), "put it there again"


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert autopainter.__version__ == version
    assert re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    images = [match for path in [*(ROOT / "k8s").rglob("*.yaml"), ROOT / "docs/kubernetes.md"]
              for match in re.findall(r"/auto-painter:([\w.]+)", path.read_text())]  # fmt: skip
    assert len(images) > 5
    assert set(images) == {version}
