"""Signals and logs of a command's process."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import sys
import threading
from types import FrameType

import absl.logging


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, or tries again later in JAX's callback of the garbage collector.

    No exception leaves that callback.
    """
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback":
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


class _Said(logging.Handler):
    """Prints log lines on standard output, also while a library's own output is redirected."""

    def __init__(self) -> None:
        super().__init__()
        self._out = sys.stdout

    def emit(self, record: logging.LogRecord) -> None:
        from diladiff_jax.console import say

        say(record.getMessage(), stream=self._out)


def escape_unencodable_output() -> None:
    """Escapes characters that standard output's encoding lacks instead of raising an error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def release_output() -> None:
    """Flushes both streams at the end of the process; a closed one is connected to nothing.

    Without this, the interpreter would report the failure and change the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)


def configure_logs() -> None:
    """Shows the library's own log from INFO on, and its dependencies' logs from WARNING on."""
    logging.raiseExceptions = False  # a log that cannot be written is no reason for a traceback
    absl.logging.set_verbosity(absl.logging.WARNING)
    # A failure in a thread of Orbax is raised where its result is awaited, and becomes one line.
    absl.logging.get_absl_handler().addFilter(
        lambda record: not {"orbax", "asyncio"} & set(pathlib.Path(record.pathname).parts)
    )
    # If one of many reads or writes fails, TensorStore's threads finish the others after their
    # event loop is closed.
    sys.unraisablehook = lambda found: (
        None if str(found.exc_value) == "Event loop is closed" else sys.__unraisablehook__(found)
    )
    log = logging.getLogger("diladiff_jax")
    log.addHandler(_Said())
    log.setLevel(logging.INFO)
    log.propagate = False
