"""Documents of tokens to rows of a fixed length. Rows hold no padding, only text and end-of-text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from diladiff_jax.data.errors import DataError

MODES = ("packed", "document")


def pack(
    token_documents: Iterable[np.ndarray], length: int, eot_id: int, mode: str
) -> Iterator[np.ndarray]:
    """Packs documents of tokens into rows.

    'packed': the stream `document, eot, document, eot, ...` is cut every `length` tokens; what is left at the
    very end (fewer than `length` tokens) is dropped, nothing else is.
    'document': each document starts a row and goes on in as many as it needs; what is left of its last row is
    filled with eot (a document that fills its rows exactly is followed by none).

    Args:
      token_documents: int32 [n_i] each, free of eot; empty ones hold nothing in 'document' mode.
      length: L, tokens a row.
      eot_id: the end-of-text token.
      mode: 'packed' or 'document'.

    Yields:
      int32 [L].

    Raises:
      DataError: another mode, or a length below 2.
    """
    if mode not in MODES:
        raise DataError(f"data.packing={mode!r}: expected one of {', '.join(MODES)}")
    if length < 2:
        raise DataError(f"data.length={length}: expected at least 2 tokens a row")
    return (_packed if mode == "packed" else _by_document)(token_documents, length, eot_id)


def _packed(
    token_documents: Iterable[np.ndarray], length: int, eot_id: int
) -> Iterator[np.ndarray]:
    row = np.empty(length, np.int32)
    filled = 0
    for document in token_documents:
        tokens = np.append(document, eot_id)
        start = 0
        while start < len(tokens):
            taken = min(length - filled, len(tokens) - start)
            row[filled : filled + taken] = tokens[start : start + taken]
            start, filled = start + taken, filled + taken
            if filled == length:
                yield row
                row, filled = np.empty(length, np.int32), 0


def _by_document(
    token_documents: Iterable[np.ndarray], length: int, eot_id: int
) -> Iterator[np.ndarray]:
    for document in token_documents:
        for start in range(0, len(document), length):
            row = np.full(length, eot_id, np.int32)
            part = document[start : start + length]
            row[: len(part)] = part
            yield row
