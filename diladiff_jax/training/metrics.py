"""Metrics out: JSON Lines, TensorBoard, and a progress line."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Mapping

import tqdm
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends to `DIRECTORY/metrics.jsonl` and to a TensorBoard event file beside it. Only process 0 should hold one."""

    def __init__(self, directory: str | pathlib.Path) -> None:
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._lines = (directory / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(directory))

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """One record: `{"step", "prefix/name": value, ...}`."""
        named = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **named}) + "\n")
        self._lines.flush()
        for name, value in named.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._lines.close()
        self._board.close()


class Progress:
    """Rate and time left: a bar on a terminal, a plain line every `seconds` in a log."""

    def __init__(self, stage: str, start: int, steps: int, *, seconds: float = 15.0, out: bool = True) -> None:
        self._stage, self._steps, self._seconds, self._out = stage, steps, seconds, out
        self._first, self._began, self._said = start, time.monotonic(), time.monotonic()
        terminal = out and sys.stderr.isatty()
        self._bar = tqdm.tqdm(total=steps, initial=start, desc=stage, unit="step", dynamic_ncols=True) if terminal else None

    def advance(self, step: int, shown: Mapping[str, float]) -> None:
        """`step` updates are done."""
        text = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if self._out and (now - self._said >= self._seconds or step == self._steps):
            self._said = now
            rate = (step - self._first) / max(now - self._began, 1e-9)
            left = (self._steps - step) / max(rate, 1e-9)
            print(f"{self._stage} {step}/{self._steps}  {rate:.2f} steps/s  {_clock(left)} left  {text}", flush=True)

    def say(self, text: str) -> None:
        """Prints above the bar."""
        if self._out:
            tqdm.tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
