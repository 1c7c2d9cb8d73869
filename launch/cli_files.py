"""Checks of the files and folders that a command will write, before it starts to work."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from typing import Any

from cli_errors import UsageError

_MAX_BYTES = 1 << 24  # how much of an existing file is read to recognize it


def check_writable_folder(flag: str, path: str) -> None:
    """Creates the folder that a flag names, so that a long command does not fail at its end.

    Raises:
      UsageError: the folder cannot be created or written.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f"--{flag}={path} cannot be written: {error.strerror}. Give a writable folder."
        ) from None


def check_replaceable(
    flag: str, path: pathlib.Path, keys: set[str], kind: str, *, json_lines: bool = False
) -> None:
    """Checks that writing the file that a flag names would not overwrite something else.

    The file may be missing, empty, or an earlier result of the same kind.

    Args:
      flag: the flag's name.
      path: the file it names.
      keys: keys that the JSON object of such a file has.
      kind: what the file should be, such as "a result of benchmark.py"; for the message.
      json_lines: whether the file is JSON Lines, of which only the first line is read.

    Raises:
      UsageError: the file's folder cannot be written, or the file is of another kind.
    """
    check_writable_folder(flag, str(path.absolute().parent))
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"--{flag}={path} is not a file. Give the name of a file.")
    try:
        with path.open("rb") as data:
            head = data.readline(_MAX_BYTES) if json_lines else data.read(_MAX_BYTES)
        if not head or keys <= json.loads(head).keys():
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise _not_writable(flag, path, error) from None
    except (ValueError, RecursionError, AttributeError):
        pass
    raise UsageError(
        f"--{flag}={path} exists and is not {kind}. Give another file, or remove this one."
    )


def write_json(flag: str, path: pathlib.Path, document: dict[str, Any]) -> None:
    """Writes the file that a flag names; it appears complete or not at all.

    Raises:
      UsageError: it cannot be written.
    """
    from diladiff_jax import files

    try:
        files.atomic_write_text(path, json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise _not_writable(flag, path, error) from None


def _not_writable(flag: str, path: pathlib.Path, error: OSError) -> UsageError:
    return UsageError(
        f"--{flag}={path} cannot be written: {error.strerror}. Give a file in a writable folder."
    )
