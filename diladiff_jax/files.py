"""Files that appear complete or not at all, and paths as a user writes them."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import IO, Any

Path = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Opens a temporary file that replaces `path` when the block ends without an error.

    The data is synced to disk before the rename, so a power cut leaves either the old file or the
    new one. If the block raises, the temporary file is removed and `path` is unchanged.

    Args:
      path: the file to write; its folder must exist.
      mode: "w" or "wb".
      **options: passed to `open`, for example `encoding`.

    Raises:
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    temporary = temporary_path(path)
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    try:
        with temporary.open(mode, **options) as out:
            yield out
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that becomes `path` when the block ends without an error.

    Every file in it is synced to disk before the rename. If the block raises, the temporary folder
    is removed.

    Args:
      path: the folder to create; it must not exist yet, or be an empty folder.

    Raises:
      OSError: the folder cannot be written.
    """
    path = pathlib.Path(path).absolute()
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for found in [*temporary.rglob("*"), temporary]:
            sync(found)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a text file through `atomic_file`. Raises as that does."""
    with atomic_file(path) as out:
        out.write(text)


def temporary_path(path: Path) -> pathlib.Path:
    """Where `atomic_file` and `atomic_folder` write before the rename: one name per process."""
    path = pathlib.Path(path)
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def abandoned_paths(path: Path) -> list[pathlib.Path]:
    """Temporary files and folders of `path` that killed processes left behind."""
    path = pathlib.Path(path)
    return sorted(path.parent.glob(f".{path.name}.tmp-*"))


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to disk if the file system supports that.

    Raises:
      OSError: the disk failed, or the file does not exist.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def expand(path: Path) -> pathlib.Path:
    """Replaces a leading `~` by the home folder; `~name` of an unknown user stays unchanged."""
    return pathlib.Path(os.path.expanduser(path))
