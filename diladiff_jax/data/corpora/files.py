"""A corpus of the user's own text files."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from diladiff_jax.data import file_selection, text_files
from diladiff_jax.data.corpora.base import Reader, StreamCorpus
from diladiff_jax.data.options import DataOptions


class TextFiles(StreamCorpus):
    """The documents in `data.files`; see `text_files` for the formats."""

    def open(self, options: DataOptions) -> Reader:
        file_selection.matching(
            options.files
        )  # fails now rather than halfway through the preparation
        return functools.partial(text_files.documents, options.files, options.field)

    def origin(self, options: DataOptions) -> str:
        return f"data.files={options.files!r}"

    def conflicts(self, options: DataOptions) -> Iterator[tuple[str, str]]:
        if not options.files:
            yield "files", "a file, folder or glob when data.corpus is text_files"
        yield from super().conflicts(options)

    def sources(self, options: DataOptions) -> Iterator[str]:
        """Every file with its size and digest, and what was left out."""
        for files in (options.files, options.validation_files):
            if files:
                yield from file_selection.describe(file_selection.select(files))

    def fingerprint(self, options: DataOptions) -> dict[str, Any]:
        """Name, size and time of modification of every file."""
        paths = file_selection.matching(options.files)
        if options.validation_files:
            paths += file_selection.matching(options.validation_files)
        return {"stamps": [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]}
