"""Which module may import which: layers, no cycles, no Ray in the library.

Imports are read from the source, those inside functions and those for type checkers too. Run:
pytest tests/test_architecture.py
"""

import ast
import functools
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    ("job", "__main__"),
    ("cli",),
    ("loop", "replay", "export", "serve", "sketches", "doctor"),
    ("reporter", "resume"),
    ("diverged", "evaluate"),
    ("paint",),
    ("trainer",),
    ("objective",),
    ("memory", "telemetry", "sheet", "host", "cleaning", "tiling", "arithmetic"),
    ("data", "models", "losses", "checkpoint", "journal", "schedule", "parallel", "progress", "compiling", "adam"),
    ("storage", "config", "seeding", "pixels", "scratch", "logs", "cgroup", "processor", "extras", "outputs"),
    ("uri", "errors", "autopainter"),
)
"""Modules and packages from top to bottom: each may import those below it. A package is one thing here: what its
modules import of each other must only be free of cycles. ``autopainter`` is the version; what else it gives out it
imports when it is asked for, so those arrows are left out."""

# Imports inside functions hide what a module needs. Where they are allowed, --help would wait for torch otherwise, or
# the doctor could not look at a machine without it.
MAY_IMPORT_LATE = ("autopainter.__main__", "autopainter.cli", "autopainter.doctor", "job")


def read_sources() -> dict[str, str]:
    """The text of every module of the library and the job, by its dotted name."""
    found = {}
    for path in (path for package in ("autopainter", "job") for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


@functools.cache
def import_statements(text: str) -> list[tuple[str, str, bool]]:
    """What a module imports: a module, a name of it or '', and whether only a function does so."""

    def walk(node: ast.AST, late: bool) -> Iterator[tuple[str, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, "", late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.module, "relative imports are not read here"
                yield from ((child.module, alias.name, late) for alias in child.names)
            yield from walk(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    return list(walk(ast.parse(text), late=False))


def unit(module: str) -> str:
    """The name that a module has in LAYERS."""
    return module.split(".")[0 if "." not in module or module.startswith("job.") else 1]


def faults(sources: dict[str, str]) -> list[str]:
    """What is wrong with the imports, a line each."""
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = [f"{module} is in no layer" for module in sources if unit(module) not in layer]
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for module, text in sources.items():
        for origin, imported, late in import_statements(text) if module != "autopainter" else []:
            name = f"{origin}.{imported}" if f"{origin}.{imported}" in sources else origin
            package = name.split(".")[0]
            if package in ("ray", "job") and not module.startswith("job"):
                wrong.append(f"{module} imports {name}")
            if name not in sources:
                continue
            graph[module].add(name)
            one, other = unit(module), unit(name)
            if one != other and not layer.get(one, -1) < layer.get(other, -1):
                wrong.append(f"{module} imports {name}, which is not below it")
            if late and not module.startswith(MAY_IMPORT_LATE):
                wrong.append(f"{module} imports {name} inside a function")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"a cycle: {' -> '.join(error.args[1])}")
    return wrong


def test_every_arrow_points_down() -> None:
    sources = read_sources()
    assert len(sources) > 100
    assert faults(sources) == []


def test_layers_name_only_what_exists_and_once() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))
    assert set(names) == {unit(module) for module in read_sources()}


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("autopainter.storage.s3", "from autopainter import trainer", "autopainter.trainer, which is not below"),
        ("autopainter.losses", "from autopainter.models.unet import UNet", "models.unet, which is not below"),
        ("autopainter.data.plan", "from autopainter.data.stream import Batch", "a cycle"),
        ("autopainter.parallel", "import ray.train", "autopainter.parallel imports ray.train"),
        ("autopainter.loop", "def f():\n    from ray import train", "autopainter.loop imports ray"),
        ("autopainter.loop", "def f():\n    from job.host import RayHost", "autopainter.loop imports job.host"),
        ("autopainter.loop", "def f():\n    from autopainter import logs", "logs inside a function"),
        ("autopainter.errors", "if TYPE_CHECKING:\n    from autopainter.config import Config", "which is not below"),
        ("autopainter.novelty", "import torch", "autopainter.novelty is in no layer"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, line: str, said: str) -> None:
    sources = read_sources()
    sources[module] = f"{sources.get(module, '')}\n{line}\n"
    (wrong, *_) = [fault for fault in faults(sources) if said in fault]
    assert module in wrong


def test_the_picture_in_the_docs_has_these_layers() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    (picture,) = re.findall(r"```\n(job .*?)```", page, re.DOTALL)
    rows = [re.split(r"\s{2,}", line.strip())[0].split() for line in picture.splitlines()]
    assert [set(row) - {"autopainter"} for row in rows] == [set(layer) - {"autopainter"} for layer in LAYERS]
