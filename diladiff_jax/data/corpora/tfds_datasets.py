"""Datasets of the TFDS catalogue, by name, and folders that TFDS has prepared."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
from collections.abc import Collection, Iterator
from typing import Any

from diladiff_jax.data.batching import batched
from diladiff_jax.data.corpora.base import Reader, StreamCorpus
from diladiff_jax.data.errors import DataError
from diladiff_jax.data.options import DataOptions
from diladiff_jax.data.tfds_folders import prepared_folder
from diladiff_jax.files import expand

_BATCH = 1024  # documents per read
_RETRIES = 5  # with pauses that double from 0.4 s
_log = logging.getLogger(__name__)


class TFDSDataset(StreamCorpus):
    """The 'train' split of the TFDS dataset that `data.corpus` names.

    Args:
      others: the names of all other corpora, for error messages.
    """

    def __init__(self, others: Collection[str]) -> None:
        self._others = others

    def open(self, options: DataOptions) -> Reader:
        builder = _builder(options.corpus, self._others)
        return functools.partial(_documents, builder, options.field)


def _builder(name: str, others: Collection[str]) -> Any:
    """The builder of a public dataset, downloaded if necessary, or of a prepared folder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    if (folder := expand(name)).joinpath("dataset_info.json").is_file():
        return prepared_folder(folder)
    # TFDS would take other names for a bucket, or fetch and run the code of a community dataset.
    if not re.fullmatch(r"\w[\w/.+-]*(:\d[\d.*]*)?", name):
        raise _unknown(name, others)
    try:
        builder = tfds.builder(name, file_format="array_record")
    except (registered.DatasetNotFoundError, ValueError) as error:
        raise _unknown(name, others) from error
    try:
        with contextlib.redirect_stdout(io.StringIO()), _bounded_retries():
            builder.download_and_prepare()
    except Exception as error:  # whatever the dataset's own code and the network raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"data.corpus={name!r} cannot be prepared by TFDS ({type(error).__name__}: {reason}). "
            "Without a network, give the folder of a dataset that TFDS has prepared elsewhere, or "
            "your own text (data.corpus=text_files)."
        ) from error
    return builder


@contextlib.contextmanager
def _bounded_retries() -> Iterator[None]:
    """Downloads give up after `_RETRIES` tries, each reported in one line, within a minute."""
    from tensorflow_datasets.core.download import downloader

    def reported(record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("Retrying"):
            return True
        first = record.args[0] if isinstance(record.args, tuple) and record.args else None
        left = getattr(first, "total", "some")
        _log.info("no connection for the download; %s more tries", left)
        return False

    log, before = logging.getLogger("urllib3.connectionpool"), downloader.MAX_RETRIES
    downloader.MAX_RETRIES = _RETRIES
    log.addFilter(reported)
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before
        log.removeFilter(reported)


def _unknown(name: str, others: Collection[str]) -> DataError:
    return DataError(
        f"data.corpus: got {name!r}, expected {', '.join(others)}, the name of a TFDS dataset "
        "or the folder of a prepared one"
    )


def _documents(builder: Any, field: str) -> Iterator[str]:
    """The documents of the builder's 'train' split."""
    if field not in builder.info.features:
        raise DataError(
            f"data.field: got {field!r}, but {builder.name} has no feature {field!r} "
            f"(found {', '.join(builder.info.features)})"
        )
    if "train" not in builder.info.splits:
        raise DataError(
            f"{builder.name} has no split 'train' (found {', '.join(builder.info.splits)})"
        )
    source = builder.as_data_source(split="train")
    for indices in batched(range(len(source)), _BATCH):
        for index, example in zip(indices, source.__getitems__(indices), strict=True):
            try:
                text = example[field].decode()
            except (UnicodeDecodeError, AttributeError) as error:
                raise DataError(
                    f"{builder.name}, example {index}: field {field!r} is not UTF-8 text"
                ) from error
            if text.strip():
                yield text
