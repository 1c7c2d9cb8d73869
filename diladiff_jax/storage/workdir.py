"""The lock that gives a workdir one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

from diladiff_jax.storage.errors import WorkdirError

LOCK_FILE = "training.lock"


@contextlib.contextmanager
def workdir_lock(workdir: pathlib.Path) -> Iterator[bool]:
    """Holds an exclusive lock on the workdir until the block ends or the process exits.

    Yields:
      True if the lock is held; False if the file system does not support locks or the lock file
      cannot be opened.

    Raises:
      WorkdirError: another process is training or preparing data in the workdir.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context((workdir / LOCK_FILE).open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            raise WorkdirError(
                f"workdir {workdir}: another process is training or preparing data there "
                f"(it holds {LOCK_FILE}). Wait for it, stop it, or use another workdir."
            ) from None
        except OSError:
            # If the workdir is read-only, training itself reports that with more context.
            locked = False
        yield locked
