"""Measures of sampled text: entropy, repetition, and the exact oracle of the stories corpus (METHOD section 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diladiff_jax.data import stories
from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.evaluation import intervals
from diladiff_jax.evaluation.intervals import Estimate


def unigram_entropy(row: np.ndarray) -> float:
    """Entropy in nats of the distribution of ids within one sample `[L]`."""
    counts = np.unique(row, return_counts=True)[1] / len(row)
    return float(-(counts * np.log(counts)).sum()) if len(row) else 0.0


def repetition(row: np.ndarray, n: int = 3) -> float:
    """Share of the sample's n-grams that occurred earlier in it; 0 for rows shorter than n."""
    grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def token_measures(tokens: np.ndarray, eot_id: int) -> dict[str, Estimate]:
    """Entropy and repetition of samples `[n, L]`.

    Entropy is over the whole row, as published figures count it; repetition over the tokens that are text, so
    that a row filled up with end-of-text does not count as repeating itself.
    """
    return {
        "entropy": intervals.mean(np.array([unigram_entropy(row) for row in tokens])),
        "repetition": intervals.mean(np.array([repetition(row[row != eot_id]) for row in tokens])),
    }


def first_documents(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The text of each row `[n, L]` up to its first end-of-text. What follows one must be end-of-text alone, or the whole row is the text."""
    texts = []
    for row in tokens:
        end = int(np.argmax(row == tokenizer.eot_id)) if (row == tokenizer.eot_id).any() else len(row)
        clean = (row[end:] == tokenizer.eot_id).all()
        texts.append(tokenizer.decode(row[:end] if clean else row))
    return texts


def oracle_measures(texts: Sequence[str]) -> dict[str, Estimate]:
    """The stories oracle: shares that are fully valid, that parse, of agreements kept; exact NLL of the valid ones; of them, the share not seen earlier among them.

    `exact_nll` in nats per document is over valid texts only (all others have probability zero) and is left
    out where there are none; the data's own mean is `stories.entropy()`.
    """
    reports = [stories.check(text) for text in texts]
    valid = [text for text, report in zip(texts, reports, strict=True) if report.valid]
    measures = {
        "valid": intervals.share(np.array([r.valid for r in reports])),
        "parses": intervals.share(np.array([r.parses for r in reports])),
        "agreement": intervals.mean(np.array([r.agreement for r in reports])),
    }
    if valid:
        measures["exact_nll"] = intervals.mean(np.array([-stories.log_likelihood(text) for text in valid]))
        measures["distinct"] = intervals.share(np.isin(np.arange(len(valid)), np.unique(valid, return_index=True)[1]))
    return measures
