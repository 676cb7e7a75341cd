"""Places for what a command writes, looked at before the work is done."""

import tempfile
from pathlib import Path

from autopainter.errors import UserError


def check_file(path: Path, option: str) -> None:
    """Check that a file can be put here, in a new folder if need be; nothing is left behind.

    Args:
        option: what the user named it by, for the message.

    Raises:
        UserError: it is a folder, or no file can be made there.
    """
    try:
        if path.is_dir():
            raise UserError(f"{option}: {path}: must be a file, not a folder")
        path.lstat()  # of a name that is too long
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{option}: {path}: cannot be written: {error.strerror}") from None
    folder = next(each for each in path.absolute().parents if each.exists() or each.is_symlink())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{option}: {path}: no file can be made in {folder}: {error.strerror}") from None


def check_png(path: Path, option: str) -> None:
    """Check that a PNG file can be put here, as ``check_file`` does."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{option}: {path}: must be a .png file")
    check_file(path, option)
