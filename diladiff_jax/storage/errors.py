"""The errors that this package raises for bad input: each is one line that names the file."""


class StorageError(RuntimeError):
    """Base of the errors below."""


class CheckpointError(StorageError):
    """A checkpoint, bundle or trained stage is missing, damaged, or cannot be read or written."""


class PretrainedError(StorageError):
    """The files of a published network are missing or cannot be read."""


class WorkdirError(StorageError):
    """Another process is using the workdir."""
