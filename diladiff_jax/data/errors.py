"""The errors of `diladiff_jax.data`: bad input, and reads that failed."""


class DataError(ValueError):
    """Bad data or data settings. The message is one line: what is wrong, where, and what to do."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))


class ReadError(DataError, OSError):
    """A read of existing data failed; another attempt may succeed."""
