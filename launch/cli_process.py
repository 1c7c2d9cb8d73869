"""Signals and logs of a command's process."""

from __future__ import annotations

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


def configure_logs() -> None:
    """Shows the library's own log from INFO on, and its dependencies' logs from WARNING on."""
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
    log, handler = logging.getLogger("diladiff_jax"), logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
