"""Documents from plain files: .txt and .jsonl (also .gz, .xz, .zst) and .parquet."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from diladiff_jax.data.errors import DataError
from diladiff_jax.files import expand

SEPARATOR = "<|endoftext|>"
"""Separates the documents of a .txt file, on a line of its own, as in TinyStories."""

_COMPRESSED = (".gz", ".xz", ".zst")
_KINDS = (".txt", ".jsonl", ".parquet")
_READABLE = ".txt, .jsonl (either also .gz, .xz or .zst) or .parquet"


def matching(files: str) -> list[Path]:
    """The readable files in a folder, of a glob, or at a path, sorted by path.

    Raises:
      DataError: nothing matches, or a matching file outside a folder has an unknown format.
    """
    if not files:
        raise DataError(f"data.files: got '', expected a folder, a glob or a file of {_READABLE}")
    path = expand(files)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
    else:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        unreadable = [p for p in found if not _kind(p)]
        if unreadable:
            raise DataError(f"{unreadable[0]} has an unknown format, expected {_READABLE}")
    if not found:
        raise DataError(
            f"data.files={files!r} matches no file; "
            f"expected a folder, a glob or a file of {_READABLE}"
        )
    return found


def documents(files: str, field: str = "text", *, blank: bool = False) -> Iterator[str]:
    """Yields the documents of `matching(files)`, file after file.

    Args:
      files: a folder, a glob or one file.
      field: the key (.jsonl) or column (.parquet) that holds the text.
      blank: whether to yield documents without any visible character too.

    Raises:
      DataError: a file that cannot be read, with its path and line.
    """
    readers = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
    for path in matching(files):
        for text in readers[_kind(path)](path, field):
            if blank or text.strip():
                yield text


def _kind(path: Path) -> str:
    """'.txt', '.jsonl', '.parquet', or '' for a file of unknown format."""
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        suffix = path.with_suffix("").suffix.lower()
        return suffix if suffix in (".txt", ".jsonl") else ""
    return suffix if suffix in _KINDS else ""


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Iterable[bytes]]:
    suffix = path.suffix.lower()
    with contextlib.ExitStack() as stack:
        if suffix == ".gz":
            yield stack.enter_context(gzip.open(path, "rb"))
        elif suffix == ".xz":
            yield stack.enter_context(lzma.open(path, "rb"))
        elif suffix == ".zst":
            import zstandard

            raw = stack.enter_context(open(path, "rb"))
            # Files compressed in parallel hold many frames; by default only the first is read.
            reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            yield stack.enter_context(io.BufferedReader(reader, 1 << 20))
        else:
            yield stack.enter_context(open(path, "rb"))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line with its line ending)."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                if b"\0" in line:
                    raise DataError(
                        f"{path}, line {number}: holds NUL bytes, expected text. "
                        "Remove the file or these bytes."
                    )
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}). "
            "Convert the file to UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}, after line {number}: cannot be read ({error})") from error
    except Exception as error:  # zstandard's error, without importing it for every file
        if type(error).__name__ != "ZstdError":
            raise
        raise DataError(f"{path}, after line {number}: cannot be read ({error})") from error


def _txt(path: Path, field: str) -> Iterator[str]:
    del field  # plain text has no fields
    lines: list[str] = []
    for _, line in _lines(path):
        if line.strip() == SEPARATOR:
            yield "".join(lines).strip("\r\n")
            lines = []
        else:
            lines.append(line)
    yield "".join(lines).strip("\r\n")


def _jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        # Numbers with too many digits are a ValueError, and deep nesting is a RecursionError.
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else error
            )
            raise DataError(
                f"{path}, line {number}: not JSON ({reason}), expected one object per line"
            ) from error
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            if text is not None:
                raise DataError(
                    f"{path}, line {number}: field {field!r} is of type {type(text).__name__}, "
                    "expected text"
                )
            keys = (
                ", ".join(sorted(record))
                if isinstance(record, dict)
                else f"a {type(record).__name__}"
            )
            raise DataError(
                f"{path}, line {number}: no text in field {field!r} (found {keys}). "
                "Set data.field to the field that holds the text."
            )
        yield text


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise DataError(
                f"{path}: no column {field!r} (found {', '.join(file.schema_arrow.names)}). "
                "Set data.field to the column that holds the text."
            )
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    raise DataError(
                        f"{path}, row {row}: column {field!r} holds {type(text).__name__}, "
                        "expected text"
                    )
                yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, after row {row}: cannot be read as Parquet ({error})") from error
