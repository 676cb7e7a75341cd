"""The errors that a user meets: each message is one line that names what was wrong and what would be right."""


class UserError(ValueError):
    """Bad input: a field, a file or a place that the user has to change. Command lines print it and exit with code 2."""


class StorageError(OSError):
    """Storage did not do what was asked, after all retries. Worth trying again later."""


class CorruptData(StorageError):
    """Bytes came back, but they are not those that were written (length or checksum differ)."""
