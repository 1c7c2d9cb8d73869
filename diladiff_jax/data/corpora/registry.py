"""The table of corpora. A new corpus is one file and one record here, or one `register_corpus`."""

from __future__ import annotations

import dataclasses

from diladiff_jax.data.corpora.base import Corpus, Reader
from diladiff_jax.data.corpora.files import TextFiles
from diladiff_jax.data.corpora.pydocs import PythonDocs
from diladiff_jax.data.corpora.stories import Stories
from diladiff_jax.data.corpora.tfds_datasets import TFDSDataset
from diladiff_jax.data.hashing import short_hash
from diladiff_jax.data.options import DataOptions
from diladiff_jax.options import OptionError

CORPORA: dict[str, Corpus] = {
    "stories": Stories(),
    "pydocs": PythonDocs(),
    "text_files": TextFiles(),
}
"""The corpora by the name that `data.corpus` selects them by; other names are TFDS datasets."""

_ANY_OTHER = TFDSDataset(CORPORA)
_NOT_OF_THE_TEXT = ("length", "packing", "directory")  # these settings don't change the documents


def register_corpus(name: str, corpus: Corpus) -> None:
    """Makes a corpus available as `data.corpus = name`.

    Raises:
      ValueError: the name is taken.
    """
    if name in CORPORA:
        raise ValueError(f"register_corpus: got {name!r}, expected a name that is not taken yet")
    CORPORA[name] = corpus


def corpus_of(name: str) -> Corpus:
    """The corpus that `data.corpus = name` selects."""
    return CORPORA.get(name, _ANY_OTHER)


def check(options: DataOptions) -> None:
    """Checks that the corpus can be read with these settings.

    Raises:
      OptionError: a setting contradicts another.
    """
    for name, valid in corpus_of(options.corpus).conflicts(options):
        raise OptionError(name, getattr(options, name), valid)


def splits(options: DataOptions) -> dict[str, Reader]:
    """For each split of the corpus, a function that begins a pass over its documents.

    Raises:
      DataError: the corpus does not exist. The functions raise it for unreadable documents.
    """
    return corpus_of(options.corpus).splits(options)


def corpus_key(options: DataOptions) -> str:
    """A short hash of everything that determines the text of the corpus; it names its folder.

    Raises:
      DataError: the corpus does not exist.
    """
    about = {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if name not in _NOT_OF_THE_TEXT
    }
    if not options.validation_last:
        del about["validation_last"]  # keeps the key of text prepared before this setting existed
    return short_hash(about | corpus_of(options.corpus).fingerprint(options))
