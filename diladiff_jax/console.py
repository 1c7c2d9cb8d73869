"""Output for the person who watches a program: it can never stop the program."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO


def say(text: str, *, error: bool = False, stream: TextIO | None = None) -> None:
    """Prints a line at once, on standard output, standard error or another stream.

    Characters that the stream's encoding lacks are escaped. A line that cannot be written, because
    the reader or the terminal is gone or the disk is full, is dropped.
    """
    if stream is None:
        stream = sys.stderr if error else sys.stdout
    if stream is None:  # a process without a console
        return
    with contextlib.suppress(OSError, ValueError):  # a closed stream raises ValueError
        stream.write(encodable(text, stream) + "\n")
        stream.flush()


def encodable(text: str, stream: TextIO) -> str:
    """`text` with characters that the stream's encoding lacks escaped, as in "\\u0142"."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
