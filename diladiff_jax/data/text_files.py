"""Documents from plain files: .txt and .jsonl (also .gz, .xz, .zst) and .parquet."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diladiff_jax.data.errors import DataError
from diladiff_jax.data.file_selection import kind, matching
from diladiff_jax.data.text_lines import lines

SEPARATOR = "<|endoftext|>"
"""Separates the documents of a .txt file, on a line of its own, as in TinyStories."""

_JOINED_BY = "\n"  # the items of a list of texts
_SURROGATE = re.compile("[\ud800-\udfff]")
_log = logging.getLogger(__name__)
_logged: set[str] = set()


def documents(files: str, field: str = "text", *, blank: bool = False) -> Iterator[str]:
    """Yields the documents of `matching(files)`, file after file.

    Rows without a text (null) are skipped, and their number is logged.

    Args:
      files: a folder, a glob or one file.
      field: the key (.jsonl) or column (.parquet) that holds the text. "a.b" is the field b of the
        object a, unless there is a field of that name. The items of a list are joined by newlines.
      blank: whether to yield documents without any visible character too.

    Raises:
      DataError: a file that cannot be read, with its path and line.
    """
    readers = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
    for path in matching(files):
        for text in readers[kind(path)](path, field):
            if blank or text.strip():
                yield text


def _txt(path: Path, field: str) -> Iterator[str]:
    del field  # plain text has no fields
    found: list[str] = []
    for _, line in lines(path):
        if line.strip() == SEPARATOR:
            yield "".join(found).strip("\r\n")
            found = []
        else:
            found.append(line)
    yield "".join(found).strip("\r\n")


def _jsonl(path: Path, field: str) -> Iterator[str]:
    nulls: list[int] = []
    for number, line in lines(path):
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
        where = f"{path}, line {number}"
        text = None if record is None else _text(record, field, where)
        if text is None:
            nulls.append(number)
            continue
        if surrogate := _SURROGATE.search(text):
            raise DataError(
                f"{where}: got a lone surrogate at character {surrogate.start()} of field "
                f"{field!r}, expected valid Unicode. Remove the line, or that escape."
            )
        yield text
    _report_nulls(path, field, "line", nulls)


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row, nulls = 0, list[int]()
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        column = field if field in names else field.partition(".")[0]
        if column not in names:
            raise DataError(
                f"{path}: no column {field!r} (found {', '.join(names)}). "
                "Set data.field to the column that holds the text."
            )
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            values = batch.column(batch.schema.get_field_index(column)).to_pylist()
            for value in values:
                row += 1
                text = _text({column: value}, field, f"{path}, row {row}")
                if text is None:
                    nulls.append(row)
                else:
                    yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, after row {row}: cannot be read as Parquet ({error})") from error
    _report_nulls(path, field, "row", nulls)


def _text(record: Any, field: str, where: str) -> str | None:
    """The text in a field of a record; None if the field or what it is in is null.

    Raises:
      DataError: there is no such field, or it holds something else.
    """
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: got {_kind_of(record)}, expected an object with the field {field!r}"
        )
    name, _, rest = (field, "", "") if field in record else field.partition(".")
    if name not in record:
        found = ", ".join(sorted(map(str, record))) or "no field"
        raise DataError(
            f"{where}: no field {field!r} (found {found}). Set data.field to the field that holds "
            "the text; a.b is the field b of the object a."
        )
    value = record[name]
    items = value if isinstance(value, list) else [value]
    if rest:
        items = [None if item is None else _text(item, rest, where) for item in items]
    texts = [item for item in items if item is not None]
    for text in texts:
        if not isinstance(text, str):
            inner = f" (it has {', '.join(map(str, text))})" if isinstance(text, dict) else ""
            raise DataError(
                f"{where}: field {field!r} holds {_kind_of(text)}{inner}, expected text or a list "
                "of texts. Set data.field to the field that holds the text; a.b is the field b of "
                "the object a."
            )
    return _JOINED_BY.join(texts) if texts or value == [] else None


def _kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", bool: "true or false", bytes: "bytes"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return names.get(type(value), "text" if isinstance(value, str) else type(value).__name__)


def _report_nulls(path: Path, field: str, unit: str, numbers: list[int]) -> None:
    """Logs how many rows had no text, once per process: every split reads the file again."""
    if not numbers:
        return
    units = f"{unit}s" if len(numbers) > 1 else unit
    line = f"{path}: {len(numbers)} {units} without a text in {field!r} skipped"
    line += f" (the first is {unit} {numbers[0]})"
    if line not in _logged:
        _logged.add(line)
        _log.info("%s", line)
