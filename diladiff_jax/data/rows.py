"""Packed rows on disk: ArrayRecord shards of token ids, one record per row."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diladiff_jax import files
from diladiff_jax.data import packing, text_store
from diladiff_jax.data.errors import DataError, ReadError
from diladiff_jax.data.hashing import short_hash
from diladiff_jax.data.options import DataOptions
from diladiff_jax.data.tokenizers import Tokenizer

DTYPES = ("<u2", "<i4")
"""The types of token ids on disk: the first one for vocabularies of up to 65,536 ids."""

RECORD = "rows.json"
"""The record beside the rows; a folder without it is incomplete."""

_ROWS_PER_SHARD = 131_072
_BATCH = 512  # documents that are encoded at a time
_REPORT_SECONDS = 10.0
_log = logging.getLogger(__name__)


class Rows:
    """The packed rows of one split: `rows[i]` is int32 [L], `rows.__getitems__([i, j])` a list.

    A failed read raises ReadError, and the next read opens the files again.
    """

    def __init__(self, paths: Sequence[Path], dtype: str, length: int):
        """Opens the shards.

        Args:
          paths: the shards, in order; at least one.
          dtype: one of `DTYPES`.
          length: L, tokens per row.

        Raises:
          DataError: the files cannot be opened.
        """
        self._paths, self._dtype, self._length = list(paths), np.dtype(dtype), length
        try:
            self._source = self._open()
        except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError
            raise DataError(
                f"{self._paths[0].parent}: the rows cannot be opened ({error}). "
                "Restore the files, or move that folder elsewhere and prepare again."
            ) from error
        self._count = len(self._source)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[np.ndarray]:
        try:
            if (source := self._source) is None:
                source = self._source = self._open()
            if len(source) != self._count:
                raise EOFError(f"got {len(source)} rows, expected {self._count}")
            records = source.__getitems__(indices)
        except (OSError, RuntimeError, EOFError) as error:
            raise self._unreadable(indices, error) from error
        # ArrayRecord returns empty records beyond the end of a truncated file.
        size = self._length * self._dtype.itemsize
        pairs = zip(indices, records, strict=True)
        if truncated := [index for index, record in pairs if len(record) != size]:
            raise self._unreadable(truncated, "truncated")
        return [np.frombuffer(record, self._dtype).astype(np.int32) for record in records]

    def _unreadable(self, indices: Sequence[int], why: object) -> ReadError:
        # The open readers may fail forever. Other threads keep those that they are using.
        self._source = None
        names = sorted({self._paths[index // _ROWS_PER_SHARD].name for index in indices})
        return ReadError(
            f"{self._paths[0].parent}: rows {_some(indices)} of {_some(names)} "
            f"cannot be read ({why})"
        )

    def _open(self) -> Any:
        from array_record.python import array_record_data_source

        return array_record_data_source.ArrayRecordDataSource([str(p) for p in self._paths])


def _some(found: Sequence[object]) -> str:
    """The first four of a list."""
    return ", ".join(map(str, found[:4])) + ", ..." * (len(found) > 4)


def open_rows(folder: Path, split: str, dtype: str, length: int, count: int) -> Rows:
    """The `count` rows of a split.

    Raises:
      DataError: the files are missing, incomplete, or cannot be opened.
    """
    paths = sorted(folder.glob(f"{split}-*.array_record"))
    rows = Rows(paths, dtype, length) if paths else None
    if rows is None or len(rows) != count:
        raise DataError(
            f"{folder}: got {len(rows or ())} rows of split {split!r}, expected {count}. "
            "Restore it, or move that folder elsewhere and prepare again."
        )
    return rows


def tokenizer_key(tokenizer: Tokenizer) -> str:
    """A short hash of everything that determines how text is encoded."""
    return short_hash(
        [tokenizer.kind, tokenizer.lowercase, tokenizer.vocab_size, tokenizer.file_hashes()]
    )


def write_rows(text: Path, tokenizer: Tokenizer, options: DataOptions, folder: Path) -> None:
    """Encodes and packs every split of a text into `folder`.

    Args:
      text: the folder that `text_store.build` wrote.
      tokenizer: encodes the documents.
      options: the length of the rows, and how documents are packed into them.
      folder: appears when it is complete; an incomplete folder of that name is replaced.

    Raises:
      DataError: a split with too little text for one row.
    """
    dtype = DTYPES[tokenizer.vocab_size > 2**16]
    with files.atomic_folder(folder) as temporary:
        counts = {
            split: _write_split(
                text_store.Documents(text, split), tokenizer, options, temporary / split, dtype
            )
            for split in text_store.splits_in(text)
        }
        record = {
            "format": 1,
            "length": options.length,
            "packing": options.packing,
            "dtype": dtype,
            "tokenizer": tokenizer_key(tokenizer),
            "counts": counts,
        }
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)


def _write_split(
    documents: text_store.Documents,
    tokenizer: Tokenizer,
    options: DataOptions,
    stem: Path,
    dtype: str,
) -> dict[str, int]:
    """Writes STEM-00000.array_record ... and counts documents, bytes, tokens and rows."""
    # A compiled module, which pyright cannot see.
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    counts = {"documents": len(documents), "bytes": 0, "tokens": 0, "rows": 0}
    encoded = _encoded(documents, tokenizer, counts, stem.name)
    writer = None
    for row in packing.pack(encoded, options.length, tokenizer.eot_id, options.packing):
        if counts["rows"] % _ROWS_PER_SHARD == 0:
            if writer is not None:
                writer.close()
            shard = f"{stem.name}-{counts['rows'] // _ROWS_PER_SHARD:05d}.array_record"
            # With one record per group, a random read costs one row; ids hardly compress anyway.
            writer = array_record_module.ArrayRecordWriter(
                str(stem.with_name(shard)), "group_size:1,uncompressed"
            )
        assert writer is not None
        writer.write(row.astype(dtype).tobytes())
        counts["rows"] += 1
    if writer is None:
        raise DataError(
            f"data.length: got {options.length}, but split {stem.name!r} has only "
            f"{counts['tokens']} tokens, too few for one row. Use more text or shorter rows."
        )
    writer.close()
    _log.info("%s: %d rows of %d tokens", stem.name, counts["rows"], options.length)
    return counts


def _encoded(
    documents: text_store.Documents, tokenizer: Tokenizer, counts: dict[str, int], name: str
) -> Iterator[np.ndarray]:
    """The token ids of each document; adds to the counts of bytes and tokens, logs the rate."""
    started = reported = time.monotonic()
    done = 0
    for batch in documents.batches(_BATCH):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            counts["bytes"] += len(text.encode())
            counts["tokens"] += len(ids) + 1
            yield ids
        done += len(batch)
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            rate = done / (reported - started)
            left = (len(documents) - done) / rate
            _log.info(
                "%s: %d of %d documents encoded, %.0f/s, %.0f s left",
                *(name, done, len(documents), rate, left),
            )
