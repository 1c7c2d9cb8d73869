"""Metrics out: JSON Lines, TensorBoard, and a progress line."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping

import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar


class MetricsWriter:
    """Appends to `DIRECTORY/metrics.jsonl` and to a TensorBoard event file beside it. Only process 0 should hold one.

    Where they cannot be written (a full disk, say) that is said once for each time it begins, and training goes on.
    """

    def __init__(self, directory: str | pathlib.Path, say: Callable[[str], None]) -> None:
        self._directory, self._say, self._failed = pathlib.Path(directory), say, False
        self._board: EventsWriter | None = (
            None  # not a SummaryWriter: its thread dies of a full disk, and whoever writes then waits for ever
        )
        self._try(lambda: self._directory.mkdir(parents=True, exist_ok=True))

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """One record: `{"step", "prefix/name": value, ...}`."""
        named = {f"{prefix}/{name}": float(value) for name, value in values.items()}

        def written() -> None:
            path = self._directory / "metrics.jsonl"
            # JSON has no infinities; and after a failure, or a process that was killed, the file may end in half a line.
            record = {"step": step} | {
                name: value if math.isfinite(value) else None for name, value in named.items()
            }
            text = ("\n" if _is_cut(path) else "") + json.dumps(record) + "\n"
            with path.open("a") as lines:
                lines.write(text)
            if self._board is None:
                self._board = EventsWriter(str(self._directory / "events"))
            for name, value in named.items():
                self._board.write_event(
                    Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                )
            self._board.flush()

        self._try(written)

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._board is not None:
            self._try(self._board.close)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if not self._failed:
                self._say(
                    f"metrics cannot be written to {self._directory} ({error.strerror or error}); training goes on without them"
                )
            self._failed = True
        else:
            self._failed = False


class Progress:
    """Rate and time left: a bar on a terminal, a plain line every `seconds` in a log."""

    def __init__(
        self, stage: str, start: int, steps: int, *, seconds: float = 15.0, out: bool = True
    ) -> None:
        self._stage, self._steps, self._seconds, self._out = stage, steps, seconds, out
        self._first, self._began, self._said = start, time.monotonic(), time.monotonic()
        terminal = out and sys.stderr.isatty()
        self._bar = (
            tqdm.tqdm(total=steps, initial=start, desc=stage, unit="step", dynamic_ncols=True)
            if terminal
            else None
        )

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
            print(
                f"{self._stage} {step}/{self._steps}  {rate:.2f} steps/s  {_clock(left)} left  {text}",
                flush=True,
            )

    def say(self, text: str) -> None:
        """Prints above the bar."""
        if self._out:
            tqdm.tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()


def _is_cut(path: pathlib.Path) -> bool:
    """Whether a file ends within a line."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as lines:
        lines.seek(-1, 2)
        return lines.read() != b"\n"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
