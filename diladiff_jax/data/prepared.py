"""Prepares the data of an experiment once: from a config to a tokenizer and packed rows on disk.

    DIR/text-KEY/              the corpus as text (TFDS, ArrayRecord)
    DIR/rows-KEY/              packed rows: SPLIT-00000.array_record ... and rows.json
    WORKDIR/tokenizer/
    WORKDIR/prepared.json      which of these folders the workdir uses

DIR is `data.directory`, or WORKDIR/data. KEY is a hash of the settings that a folder depends on, so
several workdirs may share one DIR.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diladiff_jax import files
from diladiff_jax.data import corpora, rows, text_store, tokenizers
from diladiff_jax.data.corpora import corpus_key
from diladiff_jax.data.errors import DataError
from diladiff_jax.data.hashing import short_hash
from diladiff_jax.data.options import DataOptions, TokenizerOptions
from diladiff_jax.options import OptionError

_log = logging.getLogger(__name__)

_RECORD = "prepared.json"
# What reading a JSON record raises if the file is missing, damaged, or holds something else.
_DAMAGED = (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The data that `prepare` made.

    Attributes:
      tokenizer: the tokenizer.
      length: L, tokens per row.
      counts: for each split, the numbers of 'documents', 'bytes' (of UTF-8), 'tokens' (with
        end-of-text) and 'rows'.
      text_folder: the folder of the documents.
      rows_folder: the folder of the packed rows.
      dtype: the type of token ids on disk.
    """

    tokenizer: tokenizers.Tokenizer
    length: int
    counts: dict[str, dict[str, int]]
    text_folder: Path
    rows_folder: Path
    dtype: str

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.counts)

    def rows(self, split: str) -> rows.Rows:
        """The packed rows of a split.

        Raises:
          DataError: the corpus has no such split, or its files are missing or cannot be opened.
        """
        if split not in self.counts:
            raise text_store.no_split(self.rows_folder, split, self.counts)
        count = self.counts[split]["rows"]
        return rows.open_rows(self.rows_folder, split, self.dtype, self.length, count)

    def documents(self, split: str) -> text_store.Documents:
        """The text of a split.

        Raises:
          DataError: the corpus has no such split.
        """
        return text_store.Documents(self.text_folder, split)


def prepare(
    data: DataOptions,
    tokenizer: TokenizerOptions,
    workdir: str | os.PathLike[str],
    *,
    locked: bool = False,
) -> Prepared:
    """Makes the text, tokenizer and rows that do not exist yet; each appears when it is complete.

    Args:
      data: the config's `data` block.
      tokenizer: the config's `tokenizer` block.
      workdir: the folder of the experiment.
      locked: the caller holds the workdir's lock, so temporary files in the workdir were left by
        killed processes and are removed.

    Raises:
      DataError: bad settings or documents, or the workdir's tokenizer was made with other settings
        (models trained there depend on it).
    """
    try:
        corpora.check(data)
    except OptionError as error:
        raise DataError(f"data.{error}") from None
    workdir = files.expand(workdir)
    root = _root(data, workdir)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        setting = "data.directory=" if data.directory else ""
        raise DataError(
            f"{setting}{root} cannot be made ({error.strerror}). Give a folder that can be made."
        ) from error
    if locked:
        _remove_abandoned(workdir, None if data.directory else root)
    text_key = _prepared_key(data, workdir) or corpus_key(data)
    text = root / f"text-{text_key}"
    text_store.build(data, text)
    made = _tokenizer(tokenizer, text, text_key, workdir / "tokenizer")
    rows_key = short_hash([text_key, rows.tokenizer_key(made), data.length, data.packing])
    rows_folder = root / f"rows-{rows_key}"
    if not (rows_folder / rows.RECORD).is_file():
        rows.write_rows(text, made, data, rows_folder)
    record = {"data": _recorded(data), "text": text.name, "rows": rows_folder.name}
    files.atomic_write_text(workdir / _RECORD, json.dumps(record, indent=2) + "\n")
    return load_prepared(data, workdir)


def load_prepared(data: DataOptions, workdir: str | os.PathLike[str]) -> Prepared:
    """Opens what `prepare` made. The files of the corpus itself may be gone by now.

    Raises:
      DataError: nothing is prepared, or it was prepared with other settings.
    """
    workdir = files.expand(workdir)
    remedy = f"Run launch/prepare.py with --workdir={workdir}"
    try:
        record = json.loads((workdir / _RECORD).read_text())
        text, rows_folder = (_root(data, workdir) / record[name] for name in ("text", "rows"))
        recorded = _made_with(record, data)
        about = json.loads((rows_folder / rows.RECORD).read_text())
        length, counts, dtype = (about[name] for name in ("length", "counts", "dtype"))
        tokenizer_key = about["tokenizer"]
        if dtype not in rows.DTYPES or not all(
            isinstance(counts[split]["rows"], int) for split in counts
        ):
            raise TypeError("counts or dtype")
    except _DAMAGED as error:
        where = getattr(error, "filename", None) or workdir / _RECORD
        raise DataError(
            f"{where}: no prepared data, or a damaged record of it. {remedy}."
        ) from error
    for name, value in _recorded(data).items():
        if recorded[name] != value:
            raise DataError(
                f"data.{name}: got {value!r}, but {workdir} was prepared with {recorded[name]!r}. "
                f"{remedy}, or restore that value."
            )
    tokenizer = tokenizers.load(workdir / "tokenizer")
    if tokenizer_key != rows.tokenizer_key(tokenizer):
        raise DataError(
            f"{rows_folder} was made with another tokenizer than {workdir / 'tokenizer'}. {remedy}."
        )
    return Prepared(tokenizer, length, counts, text, rows_folder, dtype)


def _remove_abandoned(workdir: Path, root: Path | None) -> None:
    """Removes temporary files of killed processes, of which text may take up most of a disk.

    `root` is the workdir's own folder of text and rows. A shared folder is left as it is, because
    processes of other workdirs may be writing there.
    """
    found = [
        path for name in ("tokenizer", _RECORD) for path in files.abandoned_paths(workdir / name)
    ]
    if root is not None:
        found += files.abandoned_paths(root / "rows-*")
        found += root.glob("text-*/text_corpus/incomplete.*")  # TFDS's own temporary folders
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _prepared_key(data: DataOptions, workdir: Path) -> str | None:
    """The key of the text that this workdir has prepared with these settings, if any.

    Later changes to the files of the corpus do not matter; they are logged.
    """
    try:
        record = json.loads((workdir / _RECORD).read_text())
        root, key = _root(data, workdir), record["text"].removeprefix("text-")
        if (
            _made_with(record, data) != _recorded(data)
            or not text_store.is_built(root / record["text"])
            or not (root / record["rows"] / rows.RECORD).is_file()
        ):
            return None
    except _DAMAGED:
        return None
    try:
        changed = corpus_key(data) != key
    except (DataError, OSError):
        changed = True
    if changed:
        _log.info(
            "The files of the corpus have changed since %s was prepared; it keeps using the text "
            "it has. Use another workdir for the new text.",
            workdir,
        )
    return key


def _root(data: DataOptions, workdir: Path) -> Path:
    """DIR of the module's docstring."""
    return files.expand(data.directory) if data.directory else workdir / "data"


def _recorded(data: DataOptions) -> dict[str, Any]:
    """The settings that `prepared.json` records."""
    return {name: value for name, value in dataclasses.asdict(data).items() if name != "directory"}


def _made_with(record: Mapping[str, Any], data: DataOptions) -> dict[str, Any]:
    """The settings in a `prepared.json`; those that did not exist yet have their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(data)}
    return {name: record["data"].get(name, defaults[name]) for name in _recorded(data)}


def _tokenizer(
    options: TokenizerOptions, text: Path, text_key: str, directory: Path
) -> tokenizers.Tokenizer:
    """The tokenizer in `directory`, which is made if it does not exist."""
    source: dict[str, Any] = {"kind": options.kind, "lowercase": options.lowercase}
    trained = options.kind in tokenizers.TRAINED
    if trained:
        source |= {
            "vocab_size": options.vocab_size,
            "whole_words": options.whole_words,
            "corpus": text_key,
        }
    else:
        source |= {"file": options.file}
    if directory.exists():
        tokenizer = tokenizers.load(directory)
        _require_same(tokenizer, source, directory)
        return tokenizer
    if trained:
        _log.info("training a %s tokenizer of %d ids", options.kind, options.vocab_size)
        sample = tokenizers.spread_sample(text_store.Documents(text, "train"))
        tokenizer = tokenizers.train(sample, options)
    else:
        tokenizer = tokenizers.from_vocabulary(options.file, options.kind, options.lowercase)
    tokenizer.save(directory, source)
    return tokenizer


def _require_same(
    tokenizer: tokenizers.Tokenizer, source: Mapping[str, Any], directory: Path
) -> None:
    """Raises DataError if the tokenizer in `directory` was made from another source."""
    found = tokenizers.source(directory)
    if "taken_from" in found:  # inherited from another experiment, made from other text
        source = {name: source[name] for name in ("kind", "lowercase")}
        found = {"kind": tokenizer.kind, "lowercase": tokenizer.lowercase}
    for name, value in source.items():
        if found.get(name) != value:
            setting = "key of the text" if name == "corpus" else f"tokenizer.{name}"
            raise DataError(
                f"{setting}: got {value!r}, but {directory} was made with "
                f"{found.get(name)!r}. Use another workdir."
            )
