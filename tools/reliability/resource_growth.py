"""How much memory, open files and threads a process gains over a long run, from /proc (Linux)."""

from __future__ import annotations

import itertools
import json
import pathlib
import statistics
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

# A checkpoint leaves about 85 KiB behind in TensorStore, a third of this in faults.py.
MAX_MEMORY_KIB_PER_STEP = 1.0
MAX_THREADS = 4  # pools start their last threads late


class Usage(NamedTuple):
    """What a process uses at one moment.

    Attributes:
      step: its last step, from its metrics.
      memory_kib: its own memory.
      files: number of open files.
      threads: number of threads.
    """

    step: int
    memory_kib: int
    files: int
    threads: int


def read_usage(process: subprocess.Popen[str], metrics: pathlib.Path) -> Usage:
    """Reads what a process uses now.

    Raises:
      OSError, KeyError, IndexError, ValueError: the process is just ending, or has not written any
        metrics yet.
    """
    proc = pathlib.Path(f"/proc/{process.pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    # Not the pages of files, which the kernel keeps or drops as it likes.
    memory_kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
    return Usage(
        json.loads(metrics.read_text().splitlines()[-1])["step"],
        memory_kib,
        len(list((proc / "fd").iterdir())),
        int(status["Threads"]),
    )


def growth(usages: Sequence[Usage], steps: int) -> tuple[float, int, int]:
    """KiB per step, files and threads that a run gained after the first tenth of its steps.

    The rest is divided into nine segments, and each counts by its lowest usage, because everything
    is higher while a checkpoint is being written. The growth of memory is the median of the growth
    from segment to segment: one large release would bias a linear fit.

    Raises:
      ValueError: a segment has no usage.
    """
    size = steps / 10
    segments = [
        [usage for usage in usages if n * size <= usage.step < (n + 1) * size] for n in range(1, 10)
    ]
    if not all(segments):
        raise ValueError(
            f"the usage was not read often enough: got {len(usages)} readings in {steps} steps,"
            " expected some in each tenth of them. Train more steps."
        )
    memory_kib, files, threads = (
        [min(usage[i] for usage in segment) for segment in segments] for i in (1, 2, 3)
    )
    memory_growth = statistics.median(b - a for a, b in itertools.pairwise(memory_kib)) / size
    return memory_growth, _increase(files), _increase(threads)


def _increase(lows: Sequence[int]) -> int:
    return min(lows[-3:]) - min(lows[:3])
