"""From a config to a tokenizer and packed rows on disk, once.

    DIR/text-KEY/              the corpus as text (TFDS, ArrayRecord)
    DIR/rows-KEY/              packed rows: SPLIT-00000.array_record ... and rows.json
    WORKDIR/tokenizer/
    WORKDIR/prepared.json      which of these the workdir uses

DIR is `data.directory` or WORKDIR/data. KEY hashes the settings that a folder depends on, so one DIR may serve many
workdirs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diladiff_jax import files
from diladiff_jax.data import corpora, packing, tokenizers
from diladiff_jax.data.errors import DataError, ReadError

_ROWS_PER_SHARD = 131_072
_DTYPES = ("<u2", "<i4")  # of rows on disk
_ENCODED = 512  # documents encoded at a time
_REPORT_SECONDS = 10.0
_log = logging.getLogger(__name__)


class Rows:
    """The packed rows of one split, by index: `rows[i]` is int32 [L], `rows.__getitems__([i, j])` a list of such.

    A read that fails raises ReadError, and the next one opens the files anew.

    Raises:
      DataError: the files cannot be opened.
    """

    def __init__(self, paths: Sequence[Path], dtype: str, length: int):
        self._paths, self._dtype, self._length = list(paths), np.dtype(dtype), length
        try:
            self._source = self._open()
        except (OSError, RuntimeError) as error:  # ArrayRecord's own are RuntimeErrors
            raise DataError(
                f"{self._paths[0].parent}: the rows cannot be opened ({error}); mend that, or remove that folder and prepare again"
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
                raise EOFError(f"{len(source)} rows where {self._count} were")
            records = source.__getitems__(indices)
        except (OSError, RuntimeError, EOFError) as error:
            raise self._unreadable(indices, error) from error
        # ArrayRecord gives out empty records behind the end of a file that was cut short.
        if cut := [
            index
            for index, record in zip(indices, records)
            if len(record) != self._length * self._dtype.itemsize
        ]:
            raise self._unreadable(cut, "cut short")
        return [np.frombuffer(record, self._dtype).astype(np.int32) for record in records]

    def _unreadable(self, indices: Sequence[int], why: object) -> ReadError:
        self._source = None  # its readers may fail for ever after; those in use in other threads live on until they are done
        files = sorted({self._paths[index // _ROWS_PER_SHARD].name for index in indices})
        rows, names = (
            ", ".join(map(str, found[:4])) + ", ..." * (len(found) > 4)
            for found in (indices, files)
        )
        return ReadError(f"{self._paths[0].parent}: rows {rows} of {names} cannot be read ({why})")

    def _open(self) -> Any:
        from array_record.python import array_record_data_source

        return array_record_data_source.ArrayRecordDataSource([str(p) for p in self._paths])


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` made.

    Attributes:
      tokenizer: the tokenizer.
      length: L, tokens a row.
      counts: for each split its 'documents', 'bytes' (of UTF-8), 'tokens' (with eots) and 'rows'.
    """

    tokenizer: tokenizers.Tokenizer
    length: int
    counts: dict[str, dict[str, int]]
    _text: Path
    _rows: Path
    _dtype: str

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.counts)

    def rows(self, split: str) -> Rows:
        """The packed rows of a split. Raises DataError for a split that the corpus lacks, and for one whose files are gone or cannot be opened."""
        if split not in self.counts:
            raise DataError(
                f"{self._rows}: no split {split!r} (found {', '.join(self.counts)}); set "
                f"data.{split}_fraction or data.{split}_documents and prepare again"
            )
        paths = sorted(self._rows.glob(f"{split}-*.array_record"))
        rows = Rows(paths, self._dtype, self.length) if paths else ()
        if len(rows) != self.counts[split]["rows"]:
            raise DataError(
                f"{self._rows}: {len(rows)} rows of split {split!r} are there, {self.counts[split]['rows']} were written; remove that folder and prepare again"
            )
        return rows

    def documents(self, split: str) -> corpora.Documents:
        """The text of a split. Raises DataError for a split that the corpus lacks."""
        return corpora.Documents(self._text, split)


def prepare(
    data: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    workdir: str | os.PathLike[str],
    *,
    alone: bool = False,
) -> Prepared:
    """Makes the corpus, tokenizer and rows that are not there yet, each aside and then renamed into place.

    Args:
      data: the config's `data` block (`corpora.Settings`).
      tokenizer: the config's `tokenizer` block: `kind`, `vocab_size` (trained kinds), `file` (the others), `lowercase`.
      workdir: where the experiment lives.
      alone: no other call works on this workdir: what earlier ones left aside in it when they were killed is removed.

    Raises:
      DataError: bad settings or documents; or a tokenizer in the workdir that was made from other settings, which
        models trained there depend on.
    """
    settings, workdir = corpora.Settings.of(data), Path(workdir)
    root = _root(settings, workdir)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{'data.directory=' if settings.directory else ''}{root} cannot be made ({error.strerror}); give a folder that can be"
        ) from error
    if alone and not settings.directory:
        _sweep(root, workdir)
    text_key = _prepared_key(settings, workdir) or settings.corpus_key()
    text = root / f"text-{text_key}"
    corpora.build(settings, text)
    made = _tokenizer(tokenizer, text, text_key, workdir / "tokenizer")
    rows = (
        root
        / f"rows-{corpora.short_hash([text_key, _fingerprint(made), settings.length, settings.packing])}"
    )
    if not (rows / "rows.json").is_file():
        _write_rows(text, made, settings, rows)
    record = {"data": _recorded(settings), "text": text.name, "rows": rows.name}
    files.atomic_write_text(workdir / "prepared.json", json.dumps(record, indent=2) + "\n")
    return load_prepared(settings, workdir)


def _sweep(root: Path, workdir: Path) -> None:
    """Removes what calls that were killed have left half made; of a corpus that may be most of a disk."""
    for left in (
        *root.glob("text-*/text_corpus/incomplete.*"),
        *root.glob("rows-*.tmp-*"),
        *workdir.glob("tokenizer.tmp-*"),
    ):
        shutil.rmtree(left, ignore_errors=True)


def _prepared_key(settings: corpora.Settings, workdir: Path) -> str | None:
    """The key of the corpus that the workdir has prepared with these settings, if it has: what became of its files since does not matter."""
    try:
        record = json.loads((workdir / "prepared.json").read_text())
        root, key = _root(settings, workdir), record["text"].removeprefix("text-")
        if (
            _made_with(record, settings) != _recorded(settings)
            or not corpora.is_built(root / record["text"])
            or not (root / record["rows"] / "rows.json").is_file()
        ):
            return None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    try:
        changed = settings.corpus_key() != key
    except (DataError, OSError):
        changed = True
    if changed:
        _log.info(
            "the files of the corpus are not as they were when %s was prepared, and it is used as it is; for what they hold now, take another workdir",
            workdir,
        )
    return key


def load_prepared(data: Mapping[str, Any], workdir: str | os.PathLike[str]) -> Prepared:
    """Opens what `prepare` made; the corpus' own files are not needed any more.

    Raises:
      DataError: nothing prepared, or prepared with other settings.
    """
    settings, workdir = corpora.Settings.of(data), Path(workdir)
    remedy = f"run launch/prepare.py with --workdir={workdir}"
    try:
        record = json.loads((workdir / "prepared.json").read_text())
        text, rows = (_root(settings, workdir) / record[name] for name in ("text", "rows"))
        about = json.loads((rows / "rows.json").read_text())
        recorded = _made_with(record, settings)
        fingerprint, length, counts, dtype = (
            about[name] for name in ("tokenizer", "length", "counts", "dtype")
        )
        if dtype not in _DTYPES or not all(
            isinstance(counts[split]["rows"], int) for split in counts
        ):
            raise TypeError("counts or dtype")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        where = getattr(error, "filename", None) or workdir / "prepared.json"
        raise DataError(
            f"{where}: no prepared data, or a damaged record of it; {remedy}"
        ) from error
    for name, value in _recorded(settings).items():
        made = recorded[name]
        if made != value:
            raise DataError(
                f"data.{name}={value!r}, but {workdir} was prepared with {made!r}; "
                f"{remedy}, or set it back"
            )
    tokenizer = tokenizers.load(workdir / "tokenizer")
    if fingerprint != _fingerprint(tokenizer):
        raise DataError(
            f"{rows}: made with another tokenizer than {workdir / 'tokenizer'}; {remedy}"
        )
    return Prepared(tokenizer, length, counts, text, rows, dtype)


def _root(settings: corpora.Settings, workdir: Path) -> Path:
    return files.expand(settings.directory) if settings.directory else workdir / "data"


def _recorded(settings: corpora.Settings) -> dict[str, Any]:
    return {
        name: value for name, value in dataclasses.asdict(settings).items() if name != "directory"
    }


def _made_with(record: Mapping[str, Any], settings: corpora.Settings) -> dict[str, Any]:
    """The settings in a `prepared.json`; one that came later was at its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(corpora.Settings)}
    return {name: record["data"].get(name, defaults[name]) for name in _recorded(settings)}


def _fingerprint(tokenizer: tokenizers.Tokenizer) -> str:
    """A short hash of everything that decides how text is encoded."""
    return corpora.short_hash(
        [tokenizer.kind, tokenizer.lowercase, tokenizer.vocab_size, tokenizer.file_hashes()]
    )


def _tokenizer(
    config: Mapping[str, Any], text: Path, text_key: str, directory: Path
) -> tokenizers.Tokenizer:
    """The tokenizer in `directory`, made there if it is not."""
    kind, lowercase = config.get("kind", ""), bool(config.get("lowercase", False))
    source = {"kind": kind, "lowercase": lowercase}
    if kind in tokenizers.TRAINED:
        source |= {
            "vocab_size": config.get("vocab_size", 0),
            "whole_words": config.get("whole_words", 0),
            "corpus": text_key,
        }
    elif kind in tokenizers.FROM_FILE:
        source |= {"file": config.get("file", "")}
    else:
        raise DataError(
            f"tokenizer.kind={kind!r}: expected one of {', '.join((*tokenizers.TRAINED, *tokenizers.FROM_FILE))}"
        )
    if directory.exists():
        tokenizer, found = tokenizers.load(directory), tokenizers.source(directory)
        if "taken_from" in found:  # another experiment's, made from other text
            source, found = (
                {"kind": kind, "lowercase": lowercase},
                {"kind": tokenizer.kind, "lowercase": tokenizer.lowercase},
            )
        for name, value in source.items():
            if found.get(name) != value:
                raise DataError(
                    f"{directory} was made with {name}={found.get(name)!r}, the config asks for {value!r}: "
                    "use another workdir, or remove the tokenizer and what was trained with it"
                )
        return tokenizer
    if kind in tokenizers.TRAINED:
        _log.info("training a %s tokenizer of %d", kind, source["vocab_size"])
        tokenizer = tokenizers.train(
            corpora.Documents(text, "train"),
            kind,
            source["vocab_size"],
            lowercase,
            source["whole_words"],
        )
    else:
        tokenizer = tokenizers.from_vocabulary(source["file"], kind, lowercase)
    tokenizer.save(directory, source)
    return tokenizer


def _write_rows(
    text: Path, tokenizer: tokenizers.Tokenizer, settings: corpora.Settings, directory: Path
) -> None:
    aside = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    dtype = _DTYPES[tokenizer.vocab_size > 2**16]
    try:
        found = corpora.prepared_folder(corpora.built(text)).info.splits
        counts = {
            split: _write_split(
                corpora.Documents(text, split), tokenizer, settings, aside / split, dtype
            )
            for split in corpora.SPLITS
            if split in found
        }
        about = {
            "format": 1,
            "length": settings.length,
            "packing": settings.packing,
            "dtype": dtype,
            "tokenizer": _fingerprint(tokenizer),
            "counts": counts,
        }
        (aside / "rows.json").write_text(json.dumps(about, indent=2) + "\n")
        shutil.rmtree(directory, ignore_errors=True)  # a folder without rows.json is of no use
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_split(
    documents: corpora.Documents,
    tokenizer: tokenizers.Tokenizer,
    settings: corpora.Settings,
    stem: Path,
    dtype: str,
) -> dict[str, int]:
    """Writes STEM-00000.array_record ... and counts what went in."""
    from array_record.python import array_record_module

    counts = {"documents": len(documents), "bytes": 0, "tokens": 0, "rows": 0}
    started = reported = time.monotonic()

    def encoded() -> Iterator[np.ndarray]:
        nonlocal reported
        done = 0
        for batch in documents.batches(_ENCODED):
            for text, ids in zip(batch, tokenizer.encode_batch(batch)):
                counts["bytes"] += len(text.encode())
                counts["tokens"] += len(ids) + 1
                yield ids
            done += len(batch)
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                rate = done / (reported - started)
                _log.info(
                    "%s: %d of %d documents encoded, %.0f/s, %.0f s left",
                    stem.name,
                    done,
                    len(documents),
                    rate,
                    (len(documents) - done) / rate,
                )

    writer = None
    for row in packing.pack(encoded(), settings.length, tokenizer.eot_id, settings.packing):
        if counts["rows"] % _ROWS_PER_SHARD == 0:
            if writer is not None:
                writer.close()
            shard = stem.with_name(
                f"{stem.name}-{counts['rows'] // _ROWS_PER_SHARD:05d}.array_record"
            )
            # One record a group makes a random read cost one row; token ids hardly compress.
            writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
        writer.write(row.astype(dtype).tobytes())
        counts["rows"] += 1
    if writer is None:
        raise DataError(
            f"split {stem.name!r} has {counts['tokens']} tokens, too few for one row of data.length="
            f"{settings.length}: use more text or shorter rows"
        )
    writer.close()
    _log.info("%s: %d rows of %d tokens", stem.name, counts["rows"], settings.length)
    return counts
