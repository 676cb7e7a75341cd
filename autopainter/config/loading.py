"""From files, environment and command line to a configuration, with errors that name the field and its place."""

import contextlib
import difflib
import functools
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from autopainter.config.sections import Config, Section, flatten, may_change
from autopainter.errors import UserError, one_line

ENVIRONMENT_PREFIX = "AUTOPAINTER__"


def load(
    path: str | Path | None, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Config:
    """Resolve a configuration.

    Args:
        path: YAML file, or None for no file.
        overrides: ``section.field=value`` texts of the command line; values are read as YAML.
        environment: variables to look for ``AUTOPAINTER__SECTION__FIELD`` in; none: the process's own.

    Raises:
        UserError: one line that names the field, where it was set, and the nearest right one.
    """
    tree: dict[str, Any] = {}
    origins: list[tuple[str, str]] = []  # fields and where they were set; a later entry wins
    if path is not None:
        tree = _read_file(path)
        origins = [(name, str(path)) for name in flatten(tree)]
    for name, text in (os.environ if environment is None else environment).items():
        if name.startswith(ENVIRONMENT_PREFIX):
            field = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            origins.append((field, f"environment variable {name}"))
            _assign(tree, *origins[-1], text)
    for override in overrides:
        field, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: write it as FIELD=VALUE, such as train.steps=100")
        origins.append((field.strip(), "--set"))
        _assign(tree, *origins[-1], text)
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, origins)) from None


def restore(document: Mapping[str, Any], origin: str) -> Config:
    """A configuration from its ``model_dump``; ``UserError`` naming ``origin`` if this program does not know it."""
    try:
        return Config.model_validate(document)
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, [(name, origin) for name in document])) from None


def _read_file(path: str | Path) -> dict[str, Any]:
    try:
        tree = _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'train:', got {type(tree).__name__}")
    for name, section in tree.items():
        for key in (name, *section) if isinstance(section, dict) else (name,):
            if not isinstance(key, str):
                raise UserError(f"{path}: {name}: {key!r} is no name of a field; YAML reads on, off, yes, no as truth")
    return {name: {} if section is None else section for name, section in tree.items()}


def _parse(text: str) -> Any:
    """Read YAML.

    Raises:
        ValueError: it is none, or holds what only looks like a value, such as a date without such a day.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None
    except Exception as error:  # PyYAML lets through whatever its constructors of numbers and dates raise
        raise ValueError(f"{one_line(error)}; write text that looks like a date or a number in quotes") from None
    try:
        flatten({"": tree})
    except RecursionError:
        raise ValueError("an alias in it stands for itself") from None
    return tree


def _assign(tree: dict[str, Any], field: str, place: str, text: str) -> None:
    *sections, name = field.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"{place}: {field}: {section} is a value, not a section")
    tree[name] = text
    if field not in _text_fields() or text in ("", "null", "~"):
        with contextlib.suppress(ValueError):  # then it is text, which is wrong for the field or not
            tree[name] = _parse(text)


def _explain(error: pydantic.ValidationError, origins: Sequence[tuple[str, str]]) -> str:
    """One line for the first of pydantic's errors."""
    first, *others = sorted(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
    field = ".".join(str(part) for part in first["loc"])
    set_here = [(name, place) for name, place in origins if _overlap(name, field)]
    origin = f"{set_here[-1][1]}: " if set_here else ""
    if first["type"] == "extra_forbidden":
        problem = f"{field}: unknown field"
        if near := difflib.get_close_matches(set_here[-1][0] if set_here else field, fields(), n=1, cutoff=0.4):
            problem += f"; did you mean {near[0]}?"
    elif first["type"] == "missing":
        field = next((name for name in _needed() if _overlap(name, field)), field)
        origin, problem = "", f"{field}: needed and not set; set it in the file or with --set {field}=..."
    elif not field:  # a combination: its message names the fields
        origin, problem = "", str(first["ctx"]["error"])
    elif first["type"] == "value_error":  # from a validator here: the message is complete, the value may be a secret
        problem = f"{field}: {first['ctx']['error']}"
    else:
        problem = f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']!r}"
    return origin + problem + (f" (and {len(others)} more)" if others else "")


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted names are the same, or one is a section of the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _each_field(section: type[Section], prefix: str = "") -> Iterator[tuple[str, pydantic.fields.FieldInfo]]:
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and issubclass(kind, Section):
            yield from _each_field(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, info


class Field(typing.NamedTuple):
    """What there is to know of a field.

    Attributes:
        default: as YAML, whose ``null`` is none; empty if it must be set.
        choices: the only values there are; empty if there are others.
        description: what it means.
        fixed: whether a run can only be continued with the same value.
    """

    default: str
    choices: tuple[str, ...]
    description: str
    fixed: bool


@functools.cache
def fields() -> dict[str, Field]:
    """Every field by its dotted name."""

    def look(name: str, info: pydantic.fields.FieldInfo) -> Field:
        default = "" if info.is_required() else json.dumps(info.default).strip('"')
        choices = typing.get_args(info.annotation) if typing.get_origin(info.annotation) is typing.Literal else ()
        return Field(default, choices, " ".join(str(info.description).split()), not may_change(name))

    return {name: look(name, info) for name, info in _each_field(Config)}


@functools.cache
def _needed() -> list[str]:
    return [name for name, info in _each_field(Config) if info.is_required()]


@functools.cache
def _text_fields() -> set[str]:
    """Fields that are any text, so that YAML must not make a date or a number of it."""
    return {name for name, info in _each_field(Config) if "str" in str(info.annotation)}
