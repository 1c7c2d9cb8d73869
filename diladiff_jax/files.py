"""Files as they must be handled where nothing may be lost, and where a name may be a stranger's."""

from __future__ import annotations

import contextlib
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
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems know no syncing of folders
        sync(path.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Has a file, or a folder's list of names, on the disk when it returns.

    Raises:
      OSError: the disk failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expand(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path with a leading ~ as the home folder; one of a user who is not there stays as it is, and so names nothing."""
    return pathlib.Path(os.path.expanduser(path))
