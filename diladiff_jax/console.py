"""Output for the person who watches a program: it can never stop the program."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import TextIO

import tqdm

_TIMED = 3  # updates


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


class Progress:
    """Rate and time left: a bar on a terminal, or one line every `seconds` in a log.

    The first update compiles, so the clock starts after it, and the time left is estimated once
    `_TIMED` more are done.
    """

    def __init__(
        self,
        stage: str,
        start: int,
        steps: int,
        *,
        unit: str = "steps",
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
        return f"{rate:.2f} {self._unit}/s  {_clock((self._steps - step) / rate)} left"

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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
