"""The errors this room raises: for bad input, and for a read that failed."""


class DataError(ValueError):
    """Bad data or data settings: one line that says what, where, and what would be right."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))


class ReadError(DataError, OSError):
    """Data that is there and was not read this time; another read may succeed."""
