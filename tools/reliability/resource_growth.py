"""What a process has grown by over a long run: memory, open files, threads, as /proc tells them (Linux alone)."""

from __future__ import annotations

import itertools
import json
import pathlib
import statistics
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

GROWTH = 1.0  # KiB a step that memory may grow by: a checkpoint leaves some 85 KiB behind in TensorStore, a third of this in tools/reliability/faults.py
THREADS = 4  # by which it may grow: pools start their last threads late


class Seen(NamedTuple):
    """A look at a process: the step that its metrics tell, its own memory in KiB, and how many files it has open and threads it has."""

    step: int
    memory: int
    files: int
    threads: int


def look(process: subprocess.Popen[str], metrics: pathlib.Path) -> Seen:
    """Raises OSError, KeyError, IndexError or ValueError where the process is just ending or has not written its metrics yet."""
    proc = pathlib.Path(f"/proc/{process.pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    memory = sum(
        int(status[name].split()[0]) for name in ("RssAnon", "VmSwap")
    )  # pages of files come and go as the machine likes
    return Seen(
        json.loads(metrics.read_text().splitlines()[-1])["step"],
        memory,
        len(list((proc / "fd").iterdir())),
        int(status["Threads"]),
    )


def grown(seen: Sequence[Seen], steps: int) -> tuple[float, int, int]:
    """KiB a step, files and threads by which a run grew after the first tenth of its steps.

    The least of each of nine parts counts: while a checkpoint is written there is more of everything. Of the growth of memory from part to part
    the median: once in a run a great deal is given back, which a line through all would take for thrift.

    Raises:
      ValueError: a part was not looked at.
    """
    part = steps / 10
    parts = [[one for one in seen if n * part <= one.step < (n + 1) * part] for n in range(1, 10)]
    if not all(parts):
        raise ValueError(f"{steps} steps are too few to look at, or the process could not be seen")
    lows = [[min(one[i] for one in some) for some in parts] for i in (1, 2, 3)]
    memory = statistics.median(b - a for a, b in itertools.pairwise(lows[0])) / part
    return memory, *(min(low[-3:]) - min(low[:3]) for low in lows[1:])
