"""The lines of a text file, compressed or not, in UTF-8 or with the byte-order mark of UTF-16."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diladiff_jax.data.errors import DataError

# UTF-32's mark begins with that of UTF-16, so it comes first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line with its line ending).

    Raises:
      DataError: the file cannot be read, or is not text.
    """
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(_decoded_or_bytes(stream), 1):
                if isinstance(line, str):
                    yield number, line
                    continue
                if b"\0" in line:
                    raise DataError(
                        f"{path}, line {number}: holds NUL bytes, expected text. If it is UTF-16 "
                        "without a byte-order mark, convert it (iconv -f UTF-16LE -t UTF-8); if "
                        "it is not text, leave the file out."
                    )
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        name = (
            "UTF-8" if error.encoding == "utf-8" else f"{error.encoding.upper()}, as its mark says"
        )
        raise DataError(
            f"{path}, line {max(number, 1)}: not {name} ({error.reason} at byte {error.start}). "
            "Convert the file to UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}, after line {number}: cannot be read ({error})") from error
    except Exception as error:  # zstandard's error, without importing it for every file
        if type(error).__name__ != "ZstdError":
            raise
        raise DataError(f"{path}, after line {number}: cannot be read ({error})") from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    suffix = path.suffix.lower()
    with contextlib.ExitStack() as stack:
        raw: Any  # of three libraries, all readable
        if suffix == ".gz":
            raw = stack.enter_context(gzip.open(path, "rb"))
        elif suffix == ".xz":
            raw = stack.enter_context(lzma.open(path, "rb"))
        elif suffix == ".zst":
            import zstandard

            packed = stack.enter_context(open(path, "rb"))
            # Files compressed in parallel hold many frames; by default only the first is read.
            raw = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
        else:
            raw = stack.enter_context(open(path, "rb", buffering=0))
        yield stack.enter_context(io.BufferedReader(raw, 1 << 20))


def _decoded_or_bytes(stream: io.BufferedReader) -> Iterable[str] | Iterable[bytes]:
    """Lines as bytes, or as text where a byte-order mark other than UTF-8's begins the file."""
    start = stream.peek(4)[:4]
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if encoding is None:
        return stream
    return io.TextIOWrapper(stream, encoding, newline="\n")  # as bytes: only \n ends a line
