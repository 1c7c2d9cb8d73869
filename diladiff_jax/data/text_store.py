"""The text of a corpus on disk: a TFDS dataset in ArrayRecord shards, for random access."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diladiff_jax.data import corpora
from diladiff_jax.data.batching import batched
from diladiff_jax.data.errors import DataError
from diladiff_jax.data.options import DataOptions
from diladiff_jax.data.text_files import SEPARATOR
from diladiff_jax.data.tfds_folders import prepared_folder

_BATCH = 1024  # documents per read
_log = logging.getLogger(__name__)


def build(options: DataOptions, directory: Path) -> None:
    """Writes the corpus under `directory`, unless it is there. TFDS renames a complete folder.

    Raises:
      DataError: the corpus does not exist, documents cannot be read, or a split would be empty.
    """
    if is_built(directory):
        return
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    splits = corpora.splits(options)
    for line in corpora.corpus_of(options.corpus).sources(options):
        _log.info("%s", line)
    builder = _builder_class()(splits, data_dir=str(directory), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints to standard output
        builder.download_and_prepare()


def is_built(directory: Path) -> bool:
    """Whether `build` has finished there."""
    return (_dataset_folder(directory) / "dataset_info.json").is_file()


def splits_in(directory: Path) -> tuple[str, ...]:
    """The splits that `build` wrote there.

    Raises:
      DataError: the dataset is missing or damaged.
    """
    found = prepared_folder(_dataset_folder(directory)).info.splits
    return tuple(split for split in corpora.SPLITS if split in found)


def _dataset_folder(directory: Path) -> Path:
    """Where TFDS puts the dataset in the folder given to `build`."""
    return directory / "text_corpus" / "1.0.0"


class Documents:
    """The documents of one split, by index; iteration and `__getitems__` read them in batches."""

    def __init__(self, directory: Path, split: str):
        """Opens a split of what `build` wrote.

        Raises:
          DataError: the corpus has no such split.
        """
        builder = prepared_folder(_dataset_folder(directory))
        if split not in builder.info.splits:
            raise no_split(directory, split, builder.info.splits)
        self._source = builder.as_data_source(split=split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[str]:
        return [example["text"].decode() for example in self._source.__getitems__(indices)]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.batches(_BATCH))

    def batches(self, size: int) -> Iterator[list[str]]:
        """All documents in order, `size` at a time."""
        return map(self.__getitems__, batched(range(len(self)), size))


def no_split(where: Path, split: str, found: Mapping[str, Any]) -> DataError:
    """The error for a split that the prepared data lacks."""
    return DataError(
        f"{where} has no split {split!r} (found {', '.join(found)}). "
        f"Set data.{split}_fraction or data.{split}_documents and prepare again."
    )


@functools.cache
def _builder_class() -> type:
    """The TFDS builder, defined on first use so that importing this module does not import TFDS."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class TextCorpus(tfds.core.GeneratorBasedBuilder):
            """Documents of text, from functions that yield them."""

            VERSION = tfds.core.Version("1.0.0")

            def __init__(self, splits: Mapping[str, Callable[[], Iterator[str]]], **kwargs: Any):
                self._splits = splits
                super().__init__(**kwargs)

            def _info(self) -> tfds.core.DatasetInfo:
                # The training pipeline shuffles; TFDS would shuffle on disk.
                return tfds.core.DatasetInfo(
                    builder=self,
                    disable_shuffling=True,
                    features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
                )

            def _split_generators(
                self, dl_manager: Any
            ) -> dict[str, Iterator[tuple[int, dict[str, bytes]]]]:
                return {split: self._generate_examples(split) for split in self._splits}

            def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, bytes]]]:
                return _examples(split, self._splits[split]())

    return TextCorpus


def _examples(split: str, documents: Iterator[str]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """The numbered examples of a split, which must have at least one."""
    number = -1
    for number, text in enumerate(documents):
        try:
            yield number, {"text": text.encode()}
        except UnicodeEncodeError as error:
            raise DataError(
                f"document {number} of split {split}: got a lone surrogate at character "
                f"{error.start}, expected valid Unicode"
            ) from error
    if number < 0:
        raise DataError(
            f"split {split!r} of the corpus got no document, expected at least one. Use a larger "
            "fraction or count for it, or more documents (in a .txt file, lines of "
            f"{SEPARATOR} separate them)."
        )
    _log.info("corpus: %d documents in split %s", number + 1, split)
