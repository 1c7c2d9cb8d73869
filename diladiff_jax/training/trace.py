"""A profiler trace of a few updates."""

from __future__ import annotations

import pathlib
from typing import Any

import jax


class TraceWindow:
    """Traces `steps` updates into `folder`, from update `at` on; nothing if `steps` is 0."""

    def __init__(self, folder: pathlib.Path, at: int, steps: int) -> None:
        self._folder, self._at, self._steps, self._running = folder, at, steps, False

    def before(self, step: int) -> None:
        """Starts the trace if update `step` is its first."""
        if self._steps and step == self._at:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, done: int, result: Any, *, last: bool) -> None:
        """Ends the trace after its last update, whose `result` it waits for."""
        if self._running and (last or done == self._at + self._steps):
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends the trace if it is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
