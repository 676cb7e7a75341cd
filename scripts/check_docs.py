"""Check what README and docs tell people to type: commands parse, programs compile; files, links, fields, tests exist.

    .venv/bin/python scripts/check_docs.py

Commands are read from the bash blocks and from the text. Ours must be understood by their own parsers, and scripts must
have the options in their --help; nothing is executed here. tests/test_docs.py runs what is cheap; RUN_ELSEWHERE says
which test runs the rest of README's.
"""

import contextlib
import functools
import io
import itertools
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import yaml

from autopainter import cli
from autopainter import config as configuration
from autopainter.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIG = ROOT / "job/configs/quickstart.yaml"
IN_POD = "/etc/autopainter/train.yaml"
"""Where the pods have the configuration of k8s/21-config.yaml."""
RUN_ELSEWHERE = {
    "bash scripts/quickstart.sh": "tests/test_quickstart.py",
    "bash scripts/test.sh": ".ci/run",
    "bash scripts/setup.sh": "scripts/test.sh",
    "autopainter vgg": "tests/test_quickstart.py",
    "python job/train.py": "tests/test_job.py",
    "ray get-auth-token": "tests/test_docs.py",
    "ray start": "tests/test_job_submit.py",
    "ray job submit": "tests/test_job_submit.py",
    "autopainter export": "tests/test_export.py",
    "autopainter serve": "tests/test_serve.py",
    "kubectl apply": "scripts/cluster_e2e.sh",
}
"""Commands of README that take long, do not end by themselves or need a cluster, and what runs them, or plays them."""
OTHERS = {
    "awk", "base64", "bash", "cd", "curl", "date", "docker", "export", "git", "grep", "head", "helm", "kubectl",
    "mkdir", "mypy", "openssl", "perl", "pip", "pre-commit", "printf", "prometheus", "ruff", "sed", "source",
    "tensorboard", "true", "xargs",
}  # fmt: skip
"""Programs that are not ours: only the shell's grammar and the files that they are given are looked at."""
_KEYWORDS = {"do", "then", "else", "{", "!", "exec"}
_NO_COMMANDS = {"for", "done", "fi", "}", "if"}
_EXPLAINED = re.compile(r"[A-Z][A-Z_-]*|.*\.\.\..*|.*\$.*")
"""Words that stand for something else."""
_FILE = re.compile(r"(?<![\w/.$:-])(?:\.ci|k8s|scripts|job|tests|docs)/[\w./*\[\]-]*[\w/\]*]")


class Block(NamedTuple):
    """A fenced block: its language, its first line's number, its text."""

    language: str
    line: int
    text: str


class Command(NamedTuple):
    """One command, as words; without variables set before it."""

    line: int
    words: list[str]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = re.finditer(r"^```([\w-]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], text.count("\n", 0, match.start()) + 2, match[2]) for match in found]


def commands(script: str, first_line: int = 1) -> Iterator[Command]:
    """The commands of a shell script, those after ``--`` and within ``$()`` as well."""
    script = re.sub(r"\\\n", lambda _: " \x00", script)  # one line, which still counts for two
    line = first_line
    for text in script.split("\n"):
        yield from _of_line(text.replace("\x00", ""), line)
        line += 1 + text.count("\x00")


def _of_line(text: str, line: int) -> Iterator[Command]:
    for inner in re.findall(r"\$\(([^()]*)\)", text):
        yield from _of_line(inner, line)
    text = re.sub(r"(?<=[a-z])\|(?=[a-z])", "/", re.sub(r"\$\([^()]*\)", "$X", text))  # list|prune: one of them
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&()")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";|&()"):
            yield from _simple(words, line)
            words = []
        else:
            words.append(word)


def _simple(words: list[str], line: int) -> Iterator[Command]:
    while words and (words[0] in _KEYWORDS or re.match(r"\w+=", words[0])):
        words = words[1:]
    if not words or words[0] in _NO_COMMANDS:
        return
    if "--" in words and words[0] in ("kubectl", "ray"):
        yield from _simple(words[words.index("--") + 1 :], line)
    yield Command(line, words)


def spans(text: str) -> Iterator[tuple[int, str]]:
    """What stands in backticks outside of blocks, with its line."""
    plain = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"`([^`\n]+)`", plain):
        yield plain.count("\n", 0, match.start()) + 1, match[1]


def anchors(page: Path) -> set[str]:
    """The names of a page's titles in links."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


# -- what may be wrong with a page; each yields lines and what is wrong there


Faults = Iterator[tuple[int, str]]


def broken_links(page: Path, text: str) -> Faults:
    """Relative links and pictures, and the titles that they name."""
    for match in re.finditer(r"\]\(([^)\s]+)\)", text):
        line, target = text.count("\n", 0, match.start()) + 1, match[1]
        if re.match(r"\w+:", target):
            continue
        path, _, title = target.partition("#")
        other = (page.parent / path) if path else page
        if not other.exists():
            yield line, f"there is no {target}"
        elif title and title not in anchors(other):
            yield line, f"{path or page.name} has no title #{title}"


def missing_files(text: str) -> Faults:
    """Files and tests of the project that a page names."""
    for number, line in enumerate(text.splitlines(), 1):
        for name in _FILE.findall(re.sub(r"https?://\S+|s3://\S+|\]\([^)]*\)", "", line)):
            if not any(ROOT.glob(name)):
                yield number, f"there is no {name}"
        for file, test in re.findall(r"(?:tests/)?(test_\w+\.py)::(\w+)", line):
            path = ROOT / "tests" / file
            if not path.exists() or f"def {test}(" not in path.read_text():
                yield number, f"there is no test {file}::{test}"


def wrong_fields(text: str) -> Faults:
    """Fields of the configuration that are named in backticks, and the values that are given to them."""
    sections = set(configuration.Config.model_fields)
    known = set(configuration.fields())
    for line, span in spans(text):
        for word in re.findall(r"(?<![\w./:*-])[a-z]+\.[a-z_0-9]+(?:(?:=|: )\S+)?", span):
            field, value, *_ = [*re.split(r"=|: ", word, maxsplit=1), ""]
            if field.split(".")[0] not in sections or re.search(r"\.(py|md|json|yaml|png)$", field):
                continue
            if field not in known:
                yield line, f"{field} is no field"
            elif value and not _EXPLAINED.fullmatch(value):
                yield from ((line, fault) for fault in _refused(None, [f"{field}={value}"]))


def _refused(path: str | None, settings: list[str]) -> Iterator[str]:
    """What the configuration says to settings; others are the file's, but for train.steps, which are many."""
    document = yaml.safe_load(CONFIG.read_text())
    if path and not _EXPLAINED.fullmatch(path):
        if path == IN_POD:
            document = yaml.safe_load(yaml.safe_load((ROOT / "k8s/21-config.yaml").read_text())["data"]["train.yaml"])
        elif not (ROOT / path).exists():
            yield f"there is no {path}"
            return
        else:
            document = yaml.safe_load((ROOT / path).read_text())
    given = [setting for setting in settings if not _EXPLAINED.fullmatch(setting.partition("=")[2])]
    document["train"]["steps"] = 1_000_000
    base = [f"{name}={value}" for name, value in configuration.flatten(document).items()]
    try:
        configuration.load(None, [*base, *given], {})
    except UserError as error:
        yield str(error)


def wrong_programs(text: str) -> Faults:
    """Blocks that the shell or Python does not understand."""
    for block in blocks(text):
        if block.language == "python":
            try:
                compile(block.text, "program", "exec")
            except SyntaxError as error:
                yield block.line + (error.lineno or 1) - 1, f"no Python: {error.msg}"
        elif block.language == "bash":
            done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
            if done.returncode:
                yield block.line, f"no shell script: {done.stderr.strip()}"
        elif any(re.match(r"(autopainter|python|bash|kubectl|pip) ", line) for line in block.text.splitlines()):
            yield block.line, "commands in a block that is not marked as bash"


def wrong_commands(text: str) -> Faults:
    """Commands, in bash blocks and in backticks, that would be refused."""
    found = [(command, False) for block in blocks(text) if block.language == "bash"
             for command in commands(block.text, block.line)]  # fmt: skip
    for line, span in spans(text):
        if re.match(r"(\w+=\S+ )*(autopainter|(\.venv/bin/)?python|bash|kubectl|ray|pip|pytest|pre-commit) \S", span):
            found += [(command, True) for command in commands(span, line)]
    functions = set(re.findall(r"^(\w+)\(\) *\{", text, re.MULTILINE))
    for (line, words), mentioned in found:
        if words[0] not in functions:
            yield from ((line, f"{shlex.join(words)}: {fault}") for fault in _wrong(words, mentioned))


def _wrong(words: list[str], mentioned: bool) -> Iterator[str]:
    """What is wrong with a command; one that is only mentioned may lack arguments."""
    program = words[0].removeprefix(".venv/bin/")
    words = words[1:]
    if program == "autopainter":
        for alternative in _alternatives(words):
            yield from _parse(cli.cli, alternative, mentioned)
    elif program == "ray":
        from ray.scripts.scripts import cli as ray

        yield from _parse(ray, words, mentioned)
    elif program == "python" and words[0].endswith(".py"):
        yield from _options_of(words[0], words[1:], mentioned)
    elif program == "bash" and words and words[0].endswith(".sh"):
        yield from _options_of(_behind(words[0]), words[1:], mentioned)
    elif program == "pip" and "." in words[-1]:
        extras = re.findall(r"[\w-]+", words[-1].removeprefix("."))
        there = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        yield from (f"there is no extra {extra}" for extra in extras if extra not in there)
    elif program not in OTHERS | {"pytest", "python", "ray"}:
        yield "nobody knows this program; see OTHERS"


def _alternatives(words: list[str]) -> list[list[str]]:
    """``checkpoints list|verify RUN``, which is read with a slash, is two commands."""
    if len(words) > 1 and re.fullmatch(r"[a-z]+(/[a-z]+)+", words[1]):
        return [[words[0], one, *words[2:]] for one in words[1].split("/")]
    return [words]


def _parse(command: click.Command, words: list[str], mentioned: bool) -> Iterator[str]:
    """What a click command says to its arguments, and the configuration to its settings."""
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            yield f"there is no command {words[0]}"
            return
        command, words = command.commands[words[0]], words[1:]
    if mentioned:
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        yield from (f"no option {word}" for word in words if word.startswith("--") and word not in known)
        return
    try:
        context = command.make_context(command.name, list(words))
    except click.exceptions.Exit:
        return  # --help
    except (click.ClickException, UserError) as error:
        yield error.format_message() if isinstance(error, click.ClickException) else str(error)
        return
    given = context.params
    if given.get("path") or given.get("overrides"):
        yield from _refused(given.get("path"), list(given.get("overrides") or ()))


def _behind(script: str) -> str:
    """The Python program that a shell script ends in, else itself."""
    path = ROOT / script
    found = re.search(r"^exec \.venv/bin/python (scripts/\w+\.py)", path.read_text(), re.M) if path.exists() else None
    return found[1] if found else script


def _options_of(script: str, words: list[str], mentioned: bool) -> Iterator[str]:
    if not (ROOT / script).exists():
        yield f"there is no {script}"
        return
    if script == "job/train.py":
        yield from _parse(cli.cli.commands["train"], words, mentioned)  # it has the same options
        return
    if script == "job/pack.py":
        yield from _parse(cli.cli.commands["pack"], words, mentioned)
        return
    if script in ("scripts/test.sh", "scripts/setup.sh"):
        return  # to pytest; an extra
    named = tuple(word for word in words[:1] if re.fullmatch(r"[a-z]+", word))
    help_text = _help(script, named if "cli" in script or script == "scripts/bench_pack.py" else ())
    for option in (word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)):
        if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_text):
            yield f"{script} has no option {option}"
    settings = [value for option, value in itertools.pairwise(words) if option == "--set"]
    yield from _refused(None, settings)


@functools.cache
def _help(script: str, words: tuple[str, ...]) -> str:
    """What a script of ours says to --help. One in Python runs in this process, which has most of its imports."""
    if script.endswith(".sh"):
        return subprocess.run(["bash", script, "--help"], cwd=ROOT, text=True, capture_output=True).stdout
    before, said = sys.argv, io.StringIO()
    sys.argv = [script, *words, "--help"]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = before
    return said.getvalue()


def unknown_names(text: str) -> Faults:
    """Names of code in docs/architecture.md that are nowhere in the code."""
    code = "\n".join(path.read_text() for folder in ("autopainter", "job", "scripts", "tests")
                     for path in (ROOT / folder).rglob("*.py"))  # fmt: skip
    words = set(re.findall(r"\w+", code))
    for line, span in spans(text):
        if re.fullmatch(r"[\w/]+\.py", span):
            if not any(ROOT.glob(f"{folder}{span}") for folder in ("", "autopainter/", "tests/")) and not any(
                ROOT.glob(f"autopainter/*/{span}")
            ):
                yield line, f"there is no {span}"
        elif re.fullmatch(r"[A-Za-z_][\w.]*", span) and span.rpartition(".")[2] not in words:
            yield line, f"nothing is called {span}"


def faults(page: Path) -> list[str]:
    """All that is wrong with a page, a line each."""
    text = page.read_text()
    found = [*broken_links(page, text), *missing_files(text), *wrong_programs(text), *wrong_commands(text)]
    found += unknown_names(text) if page.name == "architecture.md" else wrong_fields(text)
    return [f"{page.name}:{line}: {fault}" for line, fault in sorted(found)]


@click.command()
def check_docs() -> None:
    """Check README and docs: a line for each fault; the exit code is 1 if there are any."""
    found = [fault for page in PAGES for fault in faults(page)]
    click.echo("\n".join(found) or "nothing is wrong")
    sys.exit(bool(found))


if __name__ == "__main__":
    check_docs()
