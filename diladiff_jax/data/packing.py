"""Packs tokenized documents into rows of a fixed length, of text and end-of-text only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from diladiff_jax.data.errors import DataError

MODES = ("packed", "document")


def pack(
    token_documents: Iterable[np.ndarray], length: int, eot_id: int, mode: str
) -> Iterator[np.ndarray]:
    """Packs documents of tokens into rows.

    'packed': the stream `document, eot, document, eot, ...` is cut every `length` tokens. Only the
    remainder at the very end, of fewer than `length` tokens, is dropped.
    'document': each document starts a new row and takes the rows that it needs. The rest of its
    last row is filled with eot; a document that fills its rows exactly has no eot after it.

    Args:
      token_documents: int32 [n_i] each, without eot. In 'document' mode, empty documents give no
        row.
      length: L, tokens per row.
      eot_id: the end-of-text token.
      mode: 'packed' or 'document'.

    Yields:
      int32 [L].

    Raises:
      DataError: an unknown mode, or a length below 2.
    """
    if mode not in MODES:
        raise DataError(f"data.packing: got {mode!r}, expected one of {', '.join(MODES)}")
    if length < 2:
        raise DataError(f"data.length: got {length}, expected at least 2")
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
