"""Sequences in batches."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def batched(sequence: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of `size` consecutive elements; the last one may be shorter.

    Unlike `itertools.batched`, this slices, so a batch of a range is a range and a batch of an
    array is a view.
    """
    for start in range(0, len(sequence), size):
        yield sequence[start : start + size]
