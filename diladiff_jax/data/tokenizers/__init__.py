"""Tokenizers: SentencePiece models trained here, or the vocabularies of BERT, GPT-2 and others.

`train` makes a tokenizer from text, `from_vocabulary` from published files, and `load` reads one
that `Tokenizer.save` wrote.
"""

from diladiff_jax.data.options import FROM_FILE, TRAINED
from diladiff_jax.data.tokenizers.base import MASK_TEXT, Tokenizer
from diladiff_jax.data.tokenizers.kinds import (
    KINDS,
    from_vocabulary,
    load,
    source,
    vocabulary_files,
)
from diladiff_jax.data.tokenizers.training import spread_sample, train

__all__ = [
    "FROM_FILE",
    "KINDS",
    "MASK_TEXT",
    "TRAINED",
    "Tokenizer",
    "from_vocabulary",
    "load",
    "source",
    "spread_sample",
    "train",
    "vocabulary_files",
]
