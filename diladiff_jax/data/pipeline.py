"""Batches of rows through Grain, in an order that no machine layout can change."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diladiff_jax.data.errors import DataError

if TYPE_CHECKING:
    import grain

_PAUSES = (
    0.2,
    1.0,
    3.0,
    8.0,
)  # seconds before a read that failed is tried again; of the 30 that schedulers often wait after SIGTERM some must be left to save
_log = logging.getLogger(__name__)


def _patiently(read: Callable[[], np.ndarray]) -> np.ndarray:
    """What `read` gives, tried again after each pause where it raises OSError; any other error is a bug and raised as it is.

    Raises:
      DataError: it failed every time.
    """
    for pause in _PAUSES:
        try:
            return read()
        except OSError as error:
            _log.warning("%s; read again in %g s", error, pause)
            time.sleep(pause)
    try:
        return read()
    except OSError as error:
        raise DataError(
            f"{error}; {len(_PAUSES) + 1} reads within {sum(_PAUSES):.0f} s failed. Mend it, and the same command goes on from the last checkpoint"
        ) from error


def _take(rows: Any, indices: Sequence[int]) -> np.ndarray:
    """int32 [len(indices), L]: by one batched read where the source offers it."""
    batched = getattr(rows, "__getitems__", None)
    return np.stack(batched(indices) if batched else [rows[i] for i in indices]).astype(
        np.int32, copy=False
    )


def _checked(rows: Any, batch_size: int, places: Sequence[int] | None) -> Sequence[int]:
    """The places within a global batch that are read; all of them where none are given."""
    if len(rows) < 1:
        raise DataError("the row source is empty: expected at least one row")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: expected at least 1")
    places = range(batch_size) if places is None else [int(place) for place in places]
    if not len(places) or min(places) < 0 or max(places) >= batch_size:
        raise DataError(
            f"places {list(places)[:8]} of a batch: expected some of 0 to {batch_size - 1}"
        )
    return places


def _generator_seed(seed: int) -> int:
    """A 32-bit seed for Grain, which shuffles epoch e with seed + e.

    Neighbouring seeds given to it directly would train on the same epochs, moved by one.
    """
    return int.from_bytes(hashlib.blake2b(str(int(seed)).encode(), digest_size=4).digest(), "big")


class Batches:
    """Endless shuffled batches: this process's rows of each global batch, int32 [len(places), L].

    Global batch k holds the rows at places k * batch_size ... (k + 1) * batch_size - 1 of the endless sequence
    `permutation(seed, epoch 0), permutation(seed, epoch 1), ...` of all rows, so a batch may straddle two epochs
    and each epoch holds every row once. Of each, the rows at `places` are read and no others: which process holds
    which place changes nothing in the global batch. The position is the number of global batches taken, whatever
    the places, threads and prefetch.

    The threads are Grain's, within this process; there are no worker processes. A source that raises OSError is read
    again a few times, with a warning, and none of its batches is left out or given twice.
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
        """Args:
          rows: a random-access source (`len`, `[i] -> int32 [L]`, and `__getitems__` where it has it).
          batch_size: rows of a global batch.
          seed: of the permutations; any integer.
          places: which of them, from 0, this process's devices hold; default all.
          shuffle: False for the rows in order, epoch after epoch.
          threads: reading threads; 0 reads in the caller's.
          prefetch: batches read ahead.

        Raises:
          DataError: no rows, or places that are not of a batch.
        """
        import grain

        places = _checked(rows, batch_size, places)
        order = grain.MapDataset.range(len(rows))
        if shuffle:
            order = order.shuffle(seed=_generator_seed(seed))
        order = order.repeat()  # reshuffles with a new seed each epoch

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
        self._iterator = iter(self._batches)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """The next batch. Raises DataError where it cannot be read, for good; asked again, it is the same batch."""
        if self._iterator is None:
            raise ValueError("these batches are closed")
        return _patiently(self._read)

    def _read(self) -> np.ndarray:
        try:
            return next(self._iterator)
        except BaseException:
            self._iterator.set_state(
                self._iterator.get_state()
            )  # Grain's buffer is past the batch that failed, its position is not
            raise

    def get_state(self) -> dict[str, int]:
        """The position and what it is a position in, as plain integers; batches in flight are not counted."""
        if self._iterator is None:
            raise ValueError("these batches are closed")
        return {"position": int(self._iterator.get_state()["next_index"]), **self._identity}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to a position saved by `get_state`, under any process count.

        Raises:
          DataError: the state is of other rows, another seed or batch size, or no state.
        """
        for name, own in self._identity.items():
            if state.get(name) != own:
                raise DataError(
                    f"data position: saved with {name}={state.get(name)}, this run has {name}={own}; "
                    "resume with the same value or start anew"
                )
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise DataError(f"data position: {position!r} is not a number of batches")
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
        """The first rows in their order, as a finite sequence to pass over many times, for validation.

        It holds `min(count, len(rows)) // batch_size` whole global batches, of each the rows at `places`,
        int32 [len(places), L]; `count=0` means all rows.

        Raises:
          DataError: fewer rows than one batch, or places that are not of a batch.
        """
        import grain

        places = _checked(rows, batch_size, places)
        available = min(count, len(rows)) if count else len(rows)
        if available < batch_size:
            raise DataError(
                f"{available} rows do not fill one batch of {batch_size}: use a smaller batch or more rows"
            )
        return grain.MapDataset.range(available // batch_size).map(
            lambda k: _patiently(lambda: _take(rows, [k * batch_size + place for place in places]))
        )
