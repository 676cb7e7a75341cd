"""Packages that only some commands need: the extras of pyproject.toml."""

import importlib.util

from autopainter.errors import UserError


def need(user: str, extra: str, *packages: str) -> None:
    """Check, without importing them, that packages of an extra are there.

    Args:
        user: what needs them, for the message.

    Raises:
        UserError: one is not.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise missing(user, extra, package)


def missing(user: str, extra: str, package: str) -> UserError:
    """The error that a package of an extra is not there, with how to install it."""
    install = f"install it from the checkout: pip install -c constraints.txt -e '.[{extra}]'"
    return UserError(f"{user} needs {package}, which is missing; {install}")
