"""The config blocks `data` and `tokenizer`: every setting, its default and its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from diladiff_jax.data import packing
from diladiff_jax.options import Options, Rule, at_least, between, fraction_below, one_of, setting

TRAINED = ("unigram", "bpe")
"""The tokenizer kinds that are trained on the corpus."""

FROM_FILE = ("wordpiece", "byte_bpe", "sentencepiece")
"""The tokenizer kinds that are read from the file of a published vocabulary."""

# Larger values are almost certainly typos, and would trace or allocate for hours before failing.
MAX_LENGTH = 2**17
MAX_VOCABULARY = 2**20


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
    """The text of an experiment: its corpus, its splits, and its rows of tokens.

    Documents are divided among the splits by a hash of their text, except for corpora that have
    splits of their own, such as `stories`. `corpora.check` finds combinations that the corpus
    cannot be read with.
    """

    # The order of the fields is that of the record in `prepared.json`.
    corpus: str = setting(
        "openwebtext",
        "stories, pydocs, text_files, the name of a TFDS dataset, or the folder of a prepared one",
        Rule(bool, "the name of a corpus"),
    )
    files: str = setting("", "text_files: a file, folder or glob")
    validation_files: str = setting(
        "", "a file, folder or glob of validation documents, instead of validation_fraction"
    )
    field: str = setting("text", "the field with the text, in .jsonl, .parquet and TFDS datasets")
    documents: int = setting(50_000, "stories: number of training documents", at_least(1))
    validation_documents: int = setting(
        2_000, "stories: number of validation documents", at_least(1)
    )
    scorer_documents: int = setting(
        0, "stories: number of documents that train the scorer", at_least(0)
    )
    validation_fraction: float = setting(
        0.01, "fraction of the documents that is held out for validation", fraction_below(1)
    )
    validation_last: int = setting(
        0,
        "if above 0: hold out this many documents at the end, instead of validation_fraction",
        at_least(0),
    )
    scorer_fraction: float = setting(
        0.0,
        "fraction of the documents that trains the scorer, held out from everything else",
        fraction_below(1),
    )
    max_documents: int = setting(
        0, "number of documents read from the corpus; 0 reads all", at_least(0)
    )
    seed: int = setting(0, "stories: seed of the generator")
    length: int = setting(1024, "tokens per row", between(2, MAX_LENGTH))
    packing: str = setting(
        "packed",
        "packed: documents follow each other; document: one per row, filled with end-of-text",
        one_of(*packing.MODES),
    )
    directory: str = setting("", "folder of the prepared text; by default WORKDIR/data")

    @property
    def held_out_fraction(self) -> float:
        """The fraction of the documents that their hash assigns to validation.

        It is 0 if other settings choose the validation documents.
        """
        replaced = self.validation_files or self.validation_last
        return 0.0 if replaced else self.validation_fraction


@dataclasses.dataclass(frozen=True)
class TokenizerOptions(Options):
    """The tokenizer: trained on the corpus, or read from the file of a published vocabulary."""

    kind: str = setting(
        "unigram",
        f"{' and '.join(TRAINED)} are trained on the corpus; the others are read from a file",
        one_of(*TRAINED, *FROM_FILE),
    )
    vocab_size: int = setting(
        30_522, "trained kinds: vocabulary size, special ids included", between(1, MAX_VOCABULARY)
    )
    whole_words: int = setting(
        0, "trained kinds: number of frequent words that are one piece each", at_least(0)
    )
    file: str = setting("", f"{', '.join(FROM_FILE)}: the vocabulary file")
    lowercase: bool = setting(False, "convert text to lower case first")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.kind in FROM_FILE and not self.file:
            yield "file", f"a vocabulary file when tokenizer.kind is {self.kind}"
