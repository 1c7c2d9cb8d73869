"""The one error this room raises for bad input."""


class DataError(ValueError):
    """Bad data or data settings: one line that says what, where, and what would be right."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))
