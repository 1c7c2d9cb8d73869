"""Files as they must be handled where nothing may be lost, and where a name may be a stranger's."""

from __future__ import annotations

import errno
import os
import pathlib


def write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file whole or not at all: aside, on the disk, then renamed, so that a power cut leaves the old one or the new one.

    Raises:
      OSError: it cannot be written; what was there before stays.
    """
    path = pathlib.Path(path)
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with aside.open("w") as out:
            out.write(text)
        sync(aside)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Has a file, or a folder's list of names, on the disk when it returns, where the file system knows how.

    Raises:
      OSError: the disk failed, or there is no such file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def expand(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path with a leading ~ as the home folder; one of a user who is not there stays as it is, and so names nothing."""
    return pathlib.Path(os.path.expanduser(path))
