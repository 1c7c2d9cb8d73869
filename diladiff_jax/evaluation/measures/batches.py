"""One loop for measures that a program computes a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

T = TypeVar("T")


def map_batches(function: Callable[[np.ndarray], T], count: int, batch: int, *, axis: int = 0) -> T:
    """Calls a function on all rows in batches of one size, so that it is compiled once.

    Args:
      function: takes row indices `[batch]` and returns a tree of arrays with one entry per row
        along `axis`.
      count: number of rows.
      batch: rows per call; at most `count`. The last batch wraps around to the first rows, whose
        second results are dropped.
      axis: the rows' axis in the results.

    Returns:
      The results of all rows in order, as NumPy arrays with `count` entries along `axis`.
    """
    batch = min(batch, count)
    parts = [
        jax.device_get(function(np.arange(first, first + batch) % count))
        for first in range(0, count, batch)
    ]
    return jax.tree.map(
        lambda *found: np.take(np.concatenate(found, axis), np.arange(count), axis), *parts
    )
