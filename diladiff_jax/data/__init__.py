"""Text: corpora, tokenizers, packed rows, and the batches that training reads.

    prepared = prepare(DataOptions(corpus="stories", length=32), TokenizerOptions(), "workdir")
    with Batches(prepared.rows("train"), batch_size=8, seed=0) as batches:
        tokens = next(batches)  # int32 [8, 32]

Importing this package imports neither TFDS nor any tokenizer library; they load on first use.
"""

from diladiff_jax.data import corpora, tokenizers
from diladiff_jax.data.batching import batched
from diladiff_jax.data.corpora import Corpus, StreamCorpus, register_corpus, stories
from diladiff_jax.data.errors import DataError, ReadError
from diladiff_jax.data.options import DataOptions, TokenizerOptions
from diladiff_jax.data.pipeline import Batches
from diladiff_jax.data.prepared import Prepared, load_prepared, prepare
from diladiff_jax.data.rows import Rows
from diladiff_jax.data.terminal import printable
from diladiff_jax.data.tokenizers import Tokenizer

__all__ = [
    "Batches",
    "Corpus",
    "DataError",
    "DataOptions",
    "Prepared",
    "ReadError",
    "Rows",
    "StreamCorpus",
    "Tokenizer",
    "TokenizerOptions",
    "batched",
    "corpora",
    "load_prepared",
    "prepare",
    "printable",
    "register_corpus",
    "stories",
    "tokenizers",
]
