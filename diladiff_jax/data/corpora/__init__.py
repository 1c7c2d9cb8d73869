"""Corpora: where documents come from, and how they are divided into splits.

Each kind of corpus is a subclass of `Corpus` (or of `StreamCorpus`, for documents without splits
of their own) in a file of its own. `CORPORA` lists them by the name in `data.corpus`.
"""

from diladiff_jax.data.corpora.base import Corpus, Reader, StreamCorpus
from diladiff_jax.data.corpora.registry import (
    CORPORA,
    check,
    corpus_key,
    corpus_of,
    register_corpus,
    splits,
)
from diladiff_jax.data.corpora.splitting import SPLITS

__all__ = [
    "CORPORA",
    "SPLITS",
    "Corpus",
    "Reader",
    "StreamCorpus",
    "check",
    "corpus_key",
    "corpus_of",
    "register_corpus",
    "splits",
]
