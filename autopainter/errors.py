"""The errors that a user meets: each message is one line that names what was wrong and what would be right."""


def one_line(error: BaseException) -> str:
    """An error's message in one line; of one without a message, the name of its class."""
    return " ".join(str(error).split()) or type(error).__name__


class UserError(ValueError):
    """Bad input: a field, a file or a place that the user has to change. The command line ends with exit code 2."""


class StorageError(OSError):
    """Storage did not do what was asked, after all retries. Worth trying again later."""


class CorruptData(StorageError):
    """Bytes came back, but they are not those that were written (length or checksum differ)."""


class Unreadable(CorruptData):
    """Storage does not give out what it holds: it may be lost, or only be out of reach for a while."""


class Diverged(ArithmeticError):
    """A loss is no longer a number."""


class Superseded(RuntimeError):
    """Another start of the run has taken over; this one may not write any more."""


class CheckpointTooOld(StorageError):
    """No checkpoint could be saved for longer than ``checkpoint.max_age_seconds``."""
