"""Batches of rows, read by Grain, in an order that does not depend on the machines."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diladiff_jax.data.errors import DataError
from diladiff_jax.data.hashing import seed_from

if TYPE_CHECKING:
    import grain

# Seconds before a failed read is tried again. Schedulers often wait 30 s after SIGTERM; some of
# that must be left to save a checkpoint.
_PAUSES = (0.2, 1.0, 3.0, 8.0)
_log = logging.getLogger(__name__)


def _with_retries(read: Callable[[], np.ndarray]) -> np.ndarray:
    """Calls `read`, and calls it again after each pause if it raises OSError.

    Raises:
      DataError: every attempt failed.
    """
    for pause in _PAUSES:
        try:
            return read()
        except OSError as error:
            _log.warning("%s; retrying in %g s", error, pause)
            time.sleep(pause)
    try:
        return read()
    except OSError as error:
        raise DataError(
            f"{error}; {len(_PAUSES) + 1} reads within {sum(_PAUSES):.0f} s failed. "
            "Repair the file, and the same command continues from the last checkpoint."
        ) from error


def _take(rows: Any, indices: Sequence[int]) -> np.ndarray:
    """Rows stacked: token ids as int32, anything else as it is; in one read if possible."""
    read_many = getattr(rows, "__getitems__", None)
    found = np.stack(read_many(indices) if read_many else [rows[i] for i in indices])
    return found.astype(np.int32, copy=False) if found.dtype.kind in "iu" else found


def _valid_places(rows: Any, batch_size: int, places: Sequence[int] | None) -> Sequence[int]:
    """The places within a global batch that are read; all of them by default."""
    if len(rows) < 1:
        raise DataError("rows: got none, expected at least one")
    if batch_size < 1:
        raise DataError(f"batch_size: got {batch_size}, expected at least 1")
    places = range(batch_size) if places is None else [int(place) for place in places]
    if not len(places) or min(places) < 0 or max(places) >= batch_size:
        raise DataError(f"places: got {list(places)[:8]}, expected some of 0 to {batch_size - 1}")
    return places


class Batches:
    """Endless shuffled batches: this process's rows of each global batch, int32 [len(places), L].

    All rows form an endless sequence `permutation(seed, epoch 0), permutation(seed, epoch 1) ...`,
    and global batch k holds its rows k * batch_size to (k + 1) * batch_size - 1. So each epoch
    holds every row once, and a batch may straddle two epochs. Of each global batch, only the rows
    at `places` are read; which process reads which place does not change the global batch. The
    position is the number of global batches taken, whatever the places, threads and prefetch.

    Threads of Grain in this process read the rows; there are no worker processes. A read that
    raises OSError is tried again a few times with a warning. No batch is lost or repeated.
    """

    def __init__(
        self,
        rows: Any,
        batch_size: int,
        seed: int,
        places: Sequence[int] | None = None,
        *,
        shuffle: bool = True,
        threads: int = 2,
        prefetch: int = 8,
    ):
        """Starts at position 0.

        Args:
          rows: a random-access source with `len`, `[i]` (int32 `[L]`, or the row's latent), and
            maybe `__getitems__`.
          batch_size: number of rows in a global batch.
          seed: seed of the permutations; any integer.
          places: the places in a global batch, from 0, that this process's devices hold; by
            default all.
          shuffle: whether to permute the rows; if not, they come in order, epoch after epoch.
          threads: number of reading threads; 0 reads in the caller's thread.
          prefetch: number of batches to read ahead.

        Raises:
          DataError: no rows, or places outside a batch.
        """
        import grain

        places = _valid_places(rows, batch_size, places)
        order: Any = grain.MapDataset.range(len(rows))
        if shuffle:
            # Grain shuffles epoch e with seed + e. Hashing keeps neighbouring seeds from giving
            # the same epochs, shifted by one.
            order = order.shuffle(seed=seed_from(str(int(seed))))
        order = order.repeat()

        def batch(k: int) -> np.ndarray:
            return _take(rows, [int(order[k * batch_size + place]) for place in places])

        self._identity = {
            "seed": int(seed),
            "batch_size": int(batch_size),
            "rows": len(rows),
            "shuffle": int(shuffle),
        }
        # Elements are batches, not rows, so Grain's own position is the number of global batches.
        self._batches = (
            grain.MapDataset.range(sys.maxsize // batch_size)
            .map(batch)
            .to_iter_dataset(
                grain.ReadOptions(
                    num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
                )
            )
        )
        self._iterator: Any = iter(self._batches)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """The next batch.

        Raises:
          DataError: the rows cannot be read. Another call tries to read the same batch.
        """
        if self._iterator is None:
            raise ValueError("these batches are closed")
        return _with_retries(self._read)

    def _read(self) -> np.ndarray:
        try:
            return next(self._iterator)
        except BaseException:
            # Grain's buffer has moved past the batch that failed, but its position has not.
            self._iterator.set_state(self._iterator.get_state())
            raise

    def get_state(self) -> dict[str, int]:
        """The position and what it refers to, as plain integers; prefetched batches don't count."""
        if self._iterator is None:
            raise ValueError("these batches are closed")
        return {"position": int(self._iterator.get_state()["next_index"]), **self._identity}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues from a state that `get_state` gave, under any number of processes.

        Raises:
          DataError: the state is invalid, or belongs to other rows, seeds or batch sizes.
        """
        for name, own in self._identity.items():
            if state.get(name) != own:
                raise DataError(
                    f"data position: got a state with {name}={state.get(name)}, expected "
                    f"{name}={own}. Resume with the same value, or start in a new workdir."
                )
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise DataError(f"data position: got {position!r}, expected a number of batches")
        self.close()
        self._iterator = iter(self._batches)
        self._iterator.set_state({"next_index": position})

    def close(self) -> None:
        """Stops the reading threads. Safe to call twice."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def fixed(
        rows: Any, batch_size: int, count: int = 0, places: Sequence[int] | None = None
    ) -> grain.MapDataset:
        """The first rows in order, as a finite sequence of batches for validation.

        It may be iterated over many times.

        Args:
          rows: as for `Batches`.
          batch_size: number of rows in a global batch.
          count: number of rows to use; 0 uses all. An incomplete last batch is dropped.
          places: as for `Batches`.

        Returns:
          For each global batch, its rows at `places`: int32 [len(places), L].

        Raises:
          DataError: fewer rows than one batch, or places outside a batch.
        """
        import grain

        places = _valid_places(rows, batch_size, places)
        available = min(count, len(rows)) if count else len(rows)
        if available < batch_size:
            raise DataError(
                f"batch_size: got {batch_size}, but only {available} rows. "
                "Use a smaller batch or more rows."
            )
        return grain.MapDataset.range(available // batch_size).map(
            lambda k: _with_retries(
                lambda: _take(rows, [k * batch_size + place for place in places])
            )
        )
