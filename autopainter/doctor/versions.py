"""Checks of the programs: the interpreter and the packages."""

import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import autopainter
from autopainter.doctor.findings import Finding, failed, ok, skipped, warning

_CONSTRAINTS = Path(autopainter.__file__).parent.parent / "constraints.txt"
_EXTRA = {"extra": "ray"}  # of the extras, the one that a cluster needs


def python() -> Finding:
    """The interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    try:
        needed = Requirement(f"python{metadata.metadata('autopainter')['Requires-Python']}").specifier
    except metadata.PackageNotFoundError:
        advice = "install it: pip install -c constraints.txt -e ."
        return warning("Python", f"{version}; autopainter is not installed as a package", advice)
    if version not in needed:
        return failed("Python", f"{version}, needed: {needed}", f"install Python {needed} and autopainter into it")
    return ok("Python", version)


def packages() -> Finding:
    """Versions of the dependencies: what autopainter needs, and what it was tested with."""
    try:
        needed = [Requirement(text) for text in metadata.requires("autopainter") or ()]
    except metadata.PackageNotFoundError:
        return skipped("packages", "autopainter is not installed as a package, so what it needs is not known")
    tested = _tested()
    wrong, other, right = [], [], 0
    for requirement in needed:
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not always and not (requirement.marker and requirement.marker.evaluate(_EXTRA)):
            continue
        try:
            version = Version(metadata.version(requirement.name))
        except metadata.PackageNotFoundError:
            if always:
                wrong.append(f"{requirement.name} is missing")
            continue
        expected = tested.get(requirement.name.lower().replace("_", "-"))
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} (needed: {requirement.specifier})")
        elif expected and expected.public != version.public:
            other.append(f"{requirement.name} {version} (tested: {expected})")
        else:
            right += 1
    if wrong:
        return failed("packages", ", ".join([*wrong, *other]), "pip install -c constraints.txt -e .")
    if other:
        return warning(
            "packages", ", ".join(other), "pip install -c constraints.txt -e . for the versions that are tested"
        )
    return ok("packages", f"{right} of the {'tested' if tested else 'needed'} versions")


def _tested() -> dict[str, Version]:
    """The pinned versions, where the program runs from its own folder; else none."""
    try:
        lines = _CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pins = (line.split("==") for line in lines if re.fullmatch(r"[\w.-]+==[\w.+!]+", line))
    return {name.lower().replace("_", "-"): Version(version) for name, version in pins}
