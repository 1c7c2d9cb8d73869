"""Metrics to JSON Lines and TensorBoard, and a progress line."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from diladiff_jax.console import encodable, say

_TIMED = 3  # updates
_Event: Any = event_pb2.Event  # type: ignore[attr-defined] # generated at import


class MetricsWriter:
    """Appends to `DIRECTORY/metrics.jsonl` and to a TensorBoard event file; for process 0 only.

    A failure to write (a full disk, say) is logged once each time it begins, and never stops
    training.
    """

    def __init__(self, directory: str | pathlib.Path, log: Callable[[str], None]) -> None:
        self._directory, self._log, self._failed = pathlib.Path(directory), log, False
        # Not a SummaryWriter: a full disk kills its thread, and the next write then blocks forever.
        self._board: EventsWriter | None = None
        self._try(lambda: self._directory.mkdir(parents=True, exist_ok=True))

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Appends one record, `{"step", "prefix/name": value, ...}`."""
        named = {f"{prefix}/{name}": float(value) for name, value in values.items()}

        def append() -> None:
            path = self._directory / "metrics.jsonl"
            # JSON has no infinities. After a failure or a kill the file may end in half a line.
            finite = {name: v if math.isfinite(v) else None for name, v in named.items()}
            newline = "\n" if _ends_within_line(path) else ""
            with path.open("a") as lines:
                lines.write(newline + json.dumps({"step": step} | finite) + "\n")
            if self._board is None:
                self._board = EventsWriter(str(self._directory / "events"))
            for name, value in named.items():
                event = _Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self._board.write_event(event)
            self._board.flush()

        self._try(append)

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._board is not None:
            self._try(self._board.close)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if not self._failed:
                self._log(
                    f"metrics cannot be written to {self._directory} ({error.strerror or error}); "
                    f"training continues without them"
                )
            self._failed = True
        else:
            self._failed = False


class Progress:
    """Rate and time left: a bar on a terminal, or one line every `seconds` in a log.

    The first update compiles, so that the clock starts after it, and the time left is estimated
    once `_TIMED` more are done. A failure to print never stops training.
    """

    def __init__(
        self,
        stage: str,
        start: int,
        steps: int,
        *,
        unit: str = "step",
        seconds: float = 15.0,
        out: bool = True,
    ) -> None:
        self._stage, self._steps, self._seconds, self._out = stage, steps, seconds, out
        self._unit = unit
        self._first, self._began = start, 0.0  # the first update that is timed, and its time
        self._last_line = time.monotonic()
        terminal = out and sys.stderr.isatty()
        self._bar: tqdm.tqdm | None = None
        if terminal:
            with _unharmed():
                self._bar = tqdm.tqdm(
                    total=steps, initial=start, desc=stage, unit=unit, dynamic_ncols=True
                )

    def advance(self, step: int, shown: Mapping[str, float]) -> None:
        """Reports that `step` updates are done, with the metrics to show."""
        text = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        compiled, now = self._began > 0, time.monotonic()
        if not compiled:
            self._first, self._began = step, now
        if self._bar is not None:
            with _unharmed():
                if not compiled:
                    self._bar.unpause()  # forgets the time since the bar appeared
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(step - self._bar.n)
            return
        if self._out and (now - self._last_line >= self._seconds or step == self._steps):
            self._last_line = now
            parts = (f"{self._stage} {step}/{self._steps}", self._speed(step, now), text)
            say("  ".join(part for part in parts if part))

    def _speed(self, step: int, now: float) -> str:
        """The rate and the time left of this stage; "" before enough updates were timed."""
        timed = step - self._first
        if timed < _TIMED:
            return ""
        rate = timed / max(now - self._began, 1e-9)
        return f"{rate:.2f} {self._unit}s/s  {_clock((self._steps - step) / rate)} left"

    def log(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            with _unharmed():
                tqdm.tqdm.write(encodable(text, sys.stdout))
        elif self._out:
            say(text)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            with _unharmed():
                self._bar.close()


def _unharmed() -> contextlib.AbstractContextManager[None]:
    """Ignores that a terminal is gone, or cannot show a character."""
    return contextlib.suppress(OSError, ValueError)


def _ends_within_line(path: pathlib.Path) -> bool:
    """Whether the file's last line is incomplete."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as lines:
        lines.seek(-1, 2)
        return lines.read() != b"\n"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
