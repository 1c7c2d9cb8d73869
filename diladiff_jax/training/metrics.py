"""Metrics to JSON Lines and TensorBoard."""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

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


def _ends_within_line(path: pathlib.Path) -> bool:
    """Whether the file's last line is incomplete."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as lines:
        lines.seek(-1, 2)
        return lines.read() != b"\n"
